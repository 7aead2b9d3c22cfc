"""Output layer and loss in blocks: equal to the dense formula, on every rank, without whole logits at any moment."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork import parallel
from graftwork.batch import IGNORED, Batch
from graftwork.core import loss as head
from graftwork.core.loss import head_loss
from graftwork.layout import Layout
from graftwork.models import GPT, microbatch
from graftwork.models.shapes import Shape
from graftwork.peft import LoRA, Selective
from graftwork.planning.trace import _Tape
from tests.contracts.methods import adapter_parameters, loss, make, shake
from tests.helpers.distributed import run_ranks

COUNT, WIDTH, VOCABULARY, PADDED = 23, 12, 37, 48
FACTOR = 0.37
"""What comes back from behind the sum."""

Found = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_process() -> None:
    parallel.ensure_initialized()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "FEWEST_ROWS", 4)


def inputs(dtype: torch.dtype, sharpness: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (COUNT, PADDED))
    targets = torch.randint(VOCABULARY, (COUNT,), generator=generator)
    hidden = sharpness * weight[targets] if sharpness else hidden
    return hidden.to(dtype), weight.to(dtype), targets


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Found:
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    total = head_loss(hidden, weight, targets, VOCABULARY)
    (FACTOR * total).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), hidden.grad, weight.grad


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> Found:
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    total = F.cross_entropy(F.linear(hidden, weight[:VOCABULARY]), targets, reduction="sum")
    (FACTOR * total).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_loss_and_gradients_are_those_of_the_dense_formula(
    dtype: torch.dtype, tolerance: float, small_blocks: None
) -> None:
    for found, wanted in zip(ours(*inputs(dtype)), dense(*inputs(torch.float64)), strict=True):
        assert found.dtype == dtype
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_the_padding_of_the_vocabulary_has_no_gradient(small_blocks: None) -> None:
    assert not ours(*inputs(torch.float32))[2][VOCABULARY:].any()


def test_positions_that_are_nearly_learned_keep_their_gradient_in_bf16(small_blocks: None) -> None:
    """p - 1 is taken before anything is rounded: from rounded parts what is left of it would be noise."""
    hidden, weight, targets = inputs(torch.bfloat16, sharpness=1.0)
    found, whole = ours(hidden, weight, targets)[1], hidden.clone().requires_grad_()
    losses = F.cross_entropy(F.linear(whole, weight[:VOCABULARY]).float(), targets, reduction="none")
    (FACTOR * losses.sum()).backward()
    learned = (losses > 1e-5) & (losses < 0.05)
    assert whole.grad is not None and learned.sum() >= 6
    assert ((found - whole.grad).norm(dim=1) <= 0.01 * whole.grad.norm(dim=1))[learned].all()


def test_no_target_is_no_loss_and_no_gradient() -> None:
    hidden, weight, targets = inputs(torch.float32)
    total, *gradients = ours(hidden[:0], weight, targets[:0])
    assert total == 0 and not any(one.any() for one in gradients)


def test_nothing_is_differentiated_where_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(torch.float32)
    monkeypatch.setattr(head._Block, "differentiate", lambda _: pytest.fail("a gradient is made"))
    with torch.no_grad():
        found = head_loss(hidden.requires_grad_(), weight, targets, VOCABULARY)
    assert torch.allclose(found.double(), dense(hidden, weight, targets)[0])


def peak(rows: int, vocabulary: int, dtype: torch.dtype, learns: bool) -> float:
    """Bytes at most beside hidden states, weight and targets, over forward and backward."""
    hidden = torch.empty(rows, 64, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(vocabulary, 64, dtype=dtype, device="meta")
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    with _Tape({t.untyped_storage()._cdata for t in (hidden, weight, targets)}, lambda _: 1.0) as tape:
        total = head_loss(hidden, weight, targets, vocabulary)
        if learns:
            total.backward()
    return tape.peak


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1024, 2048, 8192])
def test_it_takes_an_eighth_of_the_whole_logits_at_most(rows: int, dtype: torch.dtype, learns: bool) -> None:
    whole = 4 * rows * 49_152
    assert peak(rows, 49_152, dtype, learns) <= whole / 8


def of_rank(rank: int, world: int, vocabulary: int) -> Found:
    """The loss with the vocabulary cut over two ranks; ``vocabulary`` may leave the second one without a real row."""
    parallel.initialize(Layout(tensor_model_parallel_size=world), seed=1)
    hidden, weight, targets = inputs(torch.float64)
    hidden, mine = hidden.requires_grad_(), weight.chunk(world)[rank].clone().requires_grad_()
    total = head_loss(hidden, mine, targets % vocabulary, vocabulary)
    total.backward()
    assert hidden.grad is not None and mine.grad is not None
    return total.detach(), hidden.grad, mine.grad


@pytest.mark.processes
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 7])
def test_a_vocabulary_cut_over_ranks_gives_the_same(vocabulary: int) -> None:
    ranks = run_ranks(of_rank, 2, vocabulary)
    hidden, weight, targets = inputs(torch.float64)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    total = F.cross_entropy(F.linear(hidden, weight[:vocabulary]), targets % vocabulary, reduction="sum")
    total.backward()
    assert all(torch.allclose(one[0], total, rtol=1e-13) for one in ranks)
    assert torch.allclose(ranks[0][1] + ranks[1][1], hidden.grad, rtol=1e-12, atol=1e-13)
    assert torch.allclose(torch.cat([one[2] for one in ranks]), weight.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("stack", ["full", "lora", "head", "selective"])
def test_a_model_has_the_gradients_of_its_whole_logits(
    family: str, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied or not, frozen or trained, with an adapter at the output layer, which goes the way of whole logits."""
    made = {
        "lora": [LoRA(dim=4)],
        "head": [LoRA(dim=4, target_modules=["output_layer", "word_embeddings"])],
        "selective": [Selective(patterns=["word_embeddings" if family == "llama_tied" else "output_layer"])],
    }
    results = []
    for whole in (False, True):
        model = make(family)
        model.double()
        if stack != "full":
            model.add_adapter(made[stack])
            shake(model)
        monkeypatch.setattr(microbatch, "_adapted", (lambda _: True) if whole else ADAPTED)
        loss(model).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[1].items():
        assert wanted is not None and (results[0][name] - wanted).abs().max() <= 1e-11 * wanted.abs().max(), name
    assert any(p.grad is not None for _, p in adapter_parameters(model)) or stack in ("full", "selective")


ADAPTED = microbatch._adapted


def test_only_positions_with_a_target_meet_the_vocabulary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, met = make("llama"), []

    def note(hidden: Tensor, *rest: Any) -> Tensor:
        met.append(len(hidden))
        return head_loss(hidden, *rest)

    monkeypatch.setattr(microbatch, "head_loss", note)
    loss(model)
    assert met == [12]  # six of nine positions in each of two rows


def test_a_trained_step_never_holds_whole_logits() -> None:
    """The same through a whole model, forward and backward."""
    sizes = Shape(
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=32,
        num_attention_heads=2,
        num_query_groups=2,
        vocab_size=49_152,
        max_position_embeddings=640,
    )
    model = GPT(sizes, dtype="fp32")
    model.configure_model()
    model.add_adapter([LoRA(dim=2)])
    ids = torch.zeros(1, 640, dtype=torch.int64)
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.data_ptr() != model.module.output_layer.weight.data_ptr():
                largest[0] = max(largest[0], out.untyped_storage().nbytes())
            return out

    with Watch():
        output, read = model.forward_step(iter([Batch.of(ids, ids.masked_fill(ids > 0, IGNORED))]), model.chunks[0])
        read(output)[0].backward()
    assert largest[0] <= 4 * 640 * 49_152 / 8
