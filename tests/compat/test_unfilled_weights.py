"""A model built without random values knows of its weights all that one with random values knows."""

import pytest

from graftwork import parallel
from graftwork.core.gpt import build_gpt
from tests.compat.test_parallel_parity import MOE
from tests.helpers import tiny_gpt

ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "sequence_parallel", "allreduce", "shared")


@pytest.mark.parametrize("options", [{}, {"add_bias_linear": True, "qk_layernorm": True}, MOE])
def test_attributes_do_not_depend_on_random_values(options: dict) -> None:
    parallel.ensure_initialized()
    marks = []
    for fill in (True, False):
        model = build_gpt(
            tiny_gpt.config(perform_initialization=fill, **options),
            vocab_size=96,
            max_sequence_length=32,
            position_embedding_type="learned_absolute",
            share_embeddings_and_output_weights=False,
            pre_process=True,
            post_process=True,
        )
        named = dict(model.named_parameters())
        marks.append({n: [getattr(p, a, None) for a in ATTRIBUTES] for n, p in named.items()})
    assert marks[0] == marks[1]
    assert marks[1]["output_layer.weight"][:2] == [True, 0]
