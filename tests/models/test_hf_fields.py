"""Every field of every family's config class in transformers, flipped: equal logits, or a refusal in one sentence.

Where logits are equal, those of the flipped field differ from the unflipped model's of the same weights, or the field
is listed as one that changes none.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from graftwork import models
from graftwork.errors import CheckpointError
from graftwork.models.weights import FAMILIES, check_checkpoint, read_config, shape_from_hf
from graftwork.models.weights.hf.family import FIXED, IRRELEVANT
from tests.helpers.core import loaded, logits
from tests.helpers.tiny_hf import FAMILIES as TINY
from tests.helpers.tiny_t5 import SIZES as T5_SIZES

TOLERANCE = 5e-5
"""Largest difference of logits, relative to their largest absolute value."""
LEAST = 1e-7
"""Largest difference of logits that are the same."""
TOKENS = torch.randint(57, (2, 40), generator=torch.Generator().manual_seed(3))
ABSENT = "<absent>"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
ROPE: list[Any] = [
    ABSENT,
    None,
    {},
    {"rope_theta": 500.0},
    {"rope_theta": 500.0, "rope_type": "default"},
    {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    {"rope_theta": 500.0, **LLAMA3},
    {"rope_theta": 500.0, **LLAMA3, "original_max_position_embeddings": 64},
    {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
    {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 2.0},
    {"rope_theta": 500.0, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    {"full_attention": {"rope_theta": 500.0, "rope_type": "default"}},
]
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.5] * 6, "long_factor": [2.0] * 6}
EVERY: dict[str, list[Any]] = {
    "transformers_version": ["4.30.0"],
    "architectures": [["Other"], None],
    "output_hidden_states": [True],
    "return_dict": [True],
    "dtype": ["bfloat16", "float16"],
    "chunk_size_feed_forward": [2],
    "is_encoder_decoder": [True],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0, "b": 1}],
    "problem_type": ["regression"],
    "vocab_size": [57],
    "initializer_range": [0.5],
    "use_cache": [False],
    "pad_token_id": [5, None],
    "bos_token_id": [7, None],
    "eos_token_id": [7, [3, 4]],
    "tie_word_embeddings": [True, False, ABSENT],
    # Fields that transformers reads although its classes do not declare them.
    "torch_dtype": ["bfloat16"],
    "name_or_path": ["x"],
    "output_attentions": [False],  # transformers refuses True
    "num_labels": [3],
    "per_layer_config": [{"0": {"intermediate_size": 40}}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
}
ROTARY: dict[str, list[Any]] = {
    **EVERY,
    "hidden_size": [32],
    "intermediate_size": [40],
    "num_hidden_layers": [1],
    "num_attention_heads": [2],
    "num_key_value_heads": [1, 4, None, ABSENT],
    "head_dim": [8, None, ABSENT],
    "hidden_act": ["gelu", "relu2", "silu", ABSENT],
    "max_position_embeddings": [64],
    "attention_dropout": [0.3],
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
    "rope_theta": [500.0],
    "partial_rotary_factor": [0.25, 0.5, 1.0],
    "original_max_position_embeddings": [64],
}
WINDOWS: dict[str, list[Any]] = {
    "use_sliding_window": [True],
    "sliding_window": [16, None],
    "max_window_layers": [1],
    "layer_types": [["full_attention", "sliding_attention"], ["full_attention", "full_attention"]],
}
NORM: list[Any] = [1e-2, 0.0, ABSENT]
ROUTED: dict[str, list[Any]] = {
    "num_experts_per_tok": [1, 3, 4, ABSENT],
    "output_router_logits": [True],
    "router_aux_loss_coef": [0.5],
}
QWEN_MOE: dict[str, list[Any]] = {
    **ROTARY,
    **ROUTED,
    "rms_norm_eps": NORM,
    "use_sliding_window": [True],
    "sliding_window": [16, None],
    "num_experts": [4, 6, 0, ABSENT],
    "moe_intermediate_size": [16, ABSENT],
    "norm_topk_prob": [True, False, ABSENT],
    "decoder_sparse_step": [2, 1, 3, 0, ABSENT],
    "mlp_only_layers": [[0], [1], [0, 1], [0, 7, -2], [], None, ABSENT],
}
CLASSIFIER = {"summary_type": ["mean"], "summary_use_proj": [False], "summary_activation": ["tanh"]}
CLASSIFIER |= {"summary_proj_to_labels": [False], "summary_first_dropout": [0.3]}
T5_FIELDS: dict[str, list[Any]] = {
    **EVERY,
    "is_encoder_decoder": [False, True],
    "is_decoder": [True],
    "d_model": [32],
    "d_kv": [8, ABSENT],
    "d_ff": [40],
    "num_layers": [1],
    "num_decoder_layers": [1, 3, None, ABSENT],
    "num_heads": [2],
    "hidden_size": [32, 48],
    "head_dim": [8, 16],
    "num_attention_heads": [2],
    "num_hidden_layers": [1],
    "relative_attention_num_buckets": [8, 9, 2, ABSENT],
    "relative_attention_max_distance": [20, 16, ABSENT],
    "dropout_rate": [0.3, ABSENT],
    "layer_norm_epsilon": NORM,
    "initializer_factor": [0.5],
    "feed_forward_proj": ["relu", "gated-gelu", "gelu", "gelu_new", "gated-silu", "gated-relu", ABSENT],
    "classifier_dropout": [0.3],
    "decoder_start_token_id": [3, None],
    # Fields that transformers derives, writes, and prefers to what it derives them from.
    "dense_act_fn": ["relu", "gelu", "gelu_new"],
    "is_gated_act": [True, False],
    "scale_decoder_outputs": [True, False],
}
FLIPS: dict[str, dict[str, list[Any]]] = {
    "t5": T5_FIELDS,
    "mt5": T5_FIELDS,
    "llama": {**ROTARY, "rms_norm_eps": NORM, "attention_bias": [True], "mlp_bias": [True], "pretraining_tp": [2]},
    "mistral": {**ROTARY, "rms_norm_eps": NORM, "sliding_window": [16, None, 100, 4096, ABSENT]},
    "mixtral": {
        **ROTARY,
        **ROUTED,
        "rms_norm_eps": NORM,
        "sliding_window": [16, None, 100, 4096, ABSENT],
        "num_local_experts": [6, 1, ABSENT],
        "num_experts": [4, 6],
        "router_jitter_noise": [0.1],
    },
    "qwen2": {**ROTARY, **WINDOWS, "rms_norm_eps": NORM},
    "qwen3": {**ROTARY, **WINDOWS, "rms_norm_eps": NORM, "attention_bias": [True]},
    "phi3": {
        **ROTARY,
        "rms_norm_eps": NORM,
        "rope_parameters": [*ROPE, LONGROPE, {**LONGROPE, "type": "su"}],
        "rope_scaling": [*ROPE, LONGROPE],
        "sliding_window": [16, None, 100, 4096, ABSENT],
        "original_max_position_embeddings": [64, 128],
        "resid_pdrop": [0.3],
        "embd_pdrop": [0.3],
    },
    "qwen3_moe": {**QWEN_MOE, "attention_bias": [True], "num_local_experts": [6, 5]},
    "qwen2_moe": {
        **QWEN_MOE,
        "layer_types": WINDOWS["layer_types"],
        "max_window_layers": [1],
        "qkv_bias": [True, False, ABSENT],
        "shared_expert_intermediate_size": [16, ABSENT],
    },
    "nemotron": {**ROTARY, "norm_eps": NORM, "attention_bias": [True], "mlp_bias": [True]},
    "gpt2": {
        **EVERY,
        **CLASSIFIER,
        "n_positions": [64],
        "n_embd": [32],
        "n_layer": [1],
        "n_head": [2],
        "n_inner": [40, None],
        "hidden_size": [32, 48],
        "max_position_embeddings": [64],
        "num_attention_heads": [2],
        "num_hidden_layers": [1],
        "activation_function": ["gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "relu", ABSENT],
        "resid_pdrop": [0.3],
        "embd_pdrop": [0.3],
        "attn_pdrop": [0.3],
        "layer_norm_epsilon": NORM,
        "scale_attn_weights": [False],
        "scale_attn_by_inverse_layer_idx": [True],
        "reorder_and_upcast_attn": [True],
        "add_cross_attention": [True],
        "n_ctx": [64],
    },
}
"""Values other than the tiny model's, and other than the default, for every field of a family's config class."""
QUIET: dict[str, str] = {
    **dict.fromkeys(
        ("attention_dropout", "dropout_rate", "attn_pdrop", "resid_pdrop", "embd_pdrop"), "counts in training alone"
    ),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), "how long rows may be, no more"),
    "decoder_start_token_id": "where generation begins",
    "sliding_window": "no row reaches it",
    "use_sliding_window": "honoured where it is off",
    "layer_types": "honoured where every layer has full attention",
}
"""Fields that are used and yet change no logits of a given row where they are honoured, with the reason."""
PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_scaling": {"rope_theta": 500.0}, "rope_parameters": {"rope_theta": 900.0}}),
    ("llama", {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 900.0}}),
    ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0, "rope_parameters": ABSENT}),
    ("llama", {"rope_parameters": {"rope_theta": 500.0, **LLAMA3}, "original_max_position_embeddings": 64}),
    ("nemotron", {"rope_theta": 500.0, "partial_rotary_factor": 0.25, "rope_parameters": ABSENT}),
    ("mistral", {"sliding_window": ABSENT, "max_position_embeddings": 8192}),
    ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}),
    ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_hidden_layers": 5}),
    ("qwen3_moe", {"decoder_sparse_step": 3, "mlp_only_layers": [2], "num_hidden_layers": 6}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": ABSENT, "sliding_window": 16}),
    ("gpt2", {"hidden_size": 32, "n_embd": ABSENT}),
    ("gpt2", {"num_hidden_layers": 1, "n_layer": ABSENT, "max_position_embeddings": 64, "n_positions": ABSENT}),
    ("gpt2", {"embd_pdrop": 0.3, "resid_pdrop": 0.3}),
    ("t5", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}),
    ("t5", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True}),
    ("t5", {"tie_word_embeddings": False, "scale_decoder_outputs": True}),
    ("t5", {"num_hidden_layers": 1, "num_layers": ABSENT, "head_dim": 8, "d_kv": ABSENT}),
    ("mt5", {"hidden_size": 32, "d_model": ABSENT, "num_attention_heads": 2, "num_heads": ABSENT}),
]
"""Fields that mean something together."""


def tiny_config(family: str) -> dict[str, Any]:
    """Return the fields of a two-layer model, as transformers writes them."""
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    given = {"model_type": family, **T5_SIZES} if FAMILIES[family].kind == "t5" else {**TINY[family], layers: 2}
    given |= {"mlp_only_layers": [0]} if "mlp_only_layers" in FLIPS[family] else {}  # of both kinds of layers one
    config = AutoConfig.for_model(**given).to_dict()
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "layer_types")}


def write(directory: Path, config: dict[str, Any], base: nn.Module | None = None) -> bool:
    """Write ``config`` word for word beside weights of its model; tell whether transformers can make one.

    Weights are random, but for those that a ``base`` has too, in the same shape.
    """
    directory.mkdir(exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    try:
        model = _class(directory).from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    except Exception:  # noqa: BLE001  # transformers refuses in many ways
        return False
    known = dict(base.named_parameters()) if base is not None else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in known and known[name].shape == parameter.shape:
                parameter.copy_(known[name])
            else:
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.08))
    model.save_pretrained(directory)
    path.write_text(json.dumps(config))
    return True


def outcome(directory: Path, before: Tensor | None = None) -> str:
    """Tell what became of a checkpoint: ``refused`` in one sentence, or ``equal`` to transformers' logits.

    ``changed`` is equal to them too, where they are not those ``before``.
    """
    try:
        check_checkpoint(shape_from_hf(read_config(directory)), directory)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 500, error
        return "refused"
    longest = shape_from_hf(read_config(directory)).max_position_embeddings  # a window may end it
    theirs, before = _theirs(directory)[:, :longest], None if before is None else before[:, :longest]
    ours = _ours(directory, TOKENS[:, :longest])[..., : theirs.shape[-1]]
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < TOLERANCE, f"logits differ by {difference:.1e} of their scale"
    if before is None or (before.shape == theirs.shape and torch.allclose(before, theirs, rtol=0, atol=LEAST)):
        return "equal"
    return "changed"


def _theirs(directory: Path) -> Tensor:
    model = _class(directory).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = (model(TOKENS, decoder_input_ids=TOKENS) if _is_t5(directory) else model(TOKENS)).logits
    return found


def _is_t5(directory: Path) -> bool:
    return FAMILIES[str(read_config(directory)["model_type"])].kind == "t5"


def _class(directory: Path) -> Any:
    return AutoModelForSeq2SeqLM if _is_t5(directory) else AutoModelForCausalLM


def _ours(directory: Path, tokens: Tensor) -> Tensor:
    if not _is_t5(directory):
        return logits(loaded(directory)[0], tokens)
    with torch.no_grad():
        found: Tensor = models.load(directory, dtype="fp32").eval()(tokens, tokens)
    return found


def change(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if changes.get(name) is not ABSENT}
    return {**kept, **{name: value for name, value in changes.items() if value is not ABSENT}}


@pytest.mark.parametrize("family", FLIPS)
def test_no_field_is_missing_from_the_tables(family: str) -> None:
    declared = {f.name for f in fields(type(AutoConfig.for_model(family)))}
    ours = FAMILIES[family]
    decided = {*ours.used, *ours.fixed, *ours.irrelevant, *IRRELEVANT, *FIXED, *ours.aliases}
    assert declared - FLIPS[family].keys() == set(), "no test flips these fields"
    assert declared - decided == set(), "neither used, nor fixed, nor irrelevant"
    assert set(FLIPS) == set(FAMILIES)


FAST = ("llama", "gpt2", "t5", "qwen2_moe")
"""One of each kind of class; the others are slow tests."""


@pytest.mark.parametrize("family", [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in FLIPS])
def test_every_field_counts_or_is_refused(family: str, tmp_path: Path) -> None:
    base, found = tiny_config(family), dict[tuple[str, int], str]()
    assert write(tmp_path / "base", base) and outcome(tmp_path / "base") == "equal"
    weights = _class(tmp_path / "base").from_pretrained(tmp_path / "base", dtype=torch.float32)
    before = _theirs(tmp_path / "base")
    for field, values in FLIPS[family].items():
        for number, value in enumerate(values):
            directory = tmp_path / f"{field}-{number}"
            if write(directory, change(base, {field: value}), weights):
                try:
                    found[field, number] = outcome(directory, before)
                except AssertionError as error:
                    raise AssertionError(f"{family}: {field}={value!r}: {error}") from error
    assert {"changed", "equal", "refused"} == set(found.values())
    results = {field: {found[f, n] for f, n in found if f == field} for field, _ in found}
    harmless = {*IRRELEVANT, *FAMILIES[family].irrelevant} & results.keys()
    # What says nothing of the mathematics must not be refused, and must change nothing.
    assert {field: results[field] for field in harmless if results[field] != {"equal"}} == {}
    # Everything else that the class has is known to matter: a value of it changes logits, or is refused.
    known = {f.name for f in fields(type(AutoConfig.for_model(family)))} | FAMILIES[family].used
    idle = {field for field in known & results.keys() - harmless - QUIET.keys() if results[field] == {"equal"}}
    assert idle == set()


@pytest.mark.parametrize("family, changes", PAIRS)
def test_fields_together(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if write(tmp_path / "hf", change(tiny_config(family), changes)):
        outcome(tmp_path / "hf")


WRONG: list[Any] = [None, True, "x", "1", 1.5, -1, 0, [], {}, [1], {"a": 1}, 10**400, 1e300, "x" * 10**6]


@pytest.mark.parametrize("family", FLIPS)
def test_wrong_types_are_one_sentence(family: str, tmp_path: Path) -> None:
    base, refused = tiny_config(family), 0
    assert write(tmp_path / "hf", base)
    for field in {*base, *FLIPS[family]}:
        for value in WRONG:
            (tmp_path / "hf" / "config.json").write_text(json.dumps({**base, field: value}))
            try:
                check_checkpoint(shape_from_hf(read_config(tmp_path / "hf")), tmp_path / "hf")
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 500, (field, value, error)
    assert refused > 100
