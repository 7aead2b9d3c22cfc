"""Rows of one batch are sent to different adapters, each to its own; oracle: a run with those adapters alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from graftwork.batch import IGNORED, Batch
from graftwork.errors import MatchError
from graftwork.models import GPT
from graftwork.peft import IA3, PEFT, CanonicalAdapter, CanonicalLoRA, DoRA, LoRA, PTuning, Selective
from graftwork.routes import Routes
from graftwork.ways import Way, way
from tests.contracts.methods import adapter_parameters, make, shake, tokens

ROWS: list[Way] = [
    way(None),
    way("lora"),
    way(["ia3", "bottleneck"]),
    None,
    way("second"),
    way(["lora", "second", "rows"]),
    way(["magnitudes", "rows"]),
    way(["apart", "magnitudes"]),
]
"""The base alone, one adapter, two, all of them, the second LoRA at the same site, three, other pairs."""


def close(found: Tensor, wanted: Tensor, share: float = 1e-5) -> bool:
    """Equal within the rounding of fp32, or a ``share`` of the largest value."""
    return bool((found - wanted).abs().max() <= share * wanted.abs().max())


def adapters() -> list[PEFT]:
    return [
        LoRA("lora", dim=4),
        IA3("ia3"),
        CanonicalAdapter("bottleneck", dim=6),
        LoRA("second", dim=2, target_modules=["linear_qkv", "linear_fc2", "output_layer"]),
        LoRA("rows", dim=2, target_modules=["word_embeddings"]),
        DoRA("magnitudes", dim=3),
        CanonicalLoRA("apart", dim=3),
    ]


def routed_model(**options: object) -> GPT:
    model = make(**options).train()
    model.add_adapter(adapters())
    shake(model)
    return model


@contextmanager
def alone(model: GPT, names: Way) -> Iterator[None]:
    """Switch every adapter off but those of ``names``."""
    for name in model.adapters:
        for adapter in model.stack.adapters(name):
            adapter.enabled = names is None or name in names
    yield
    for adapter in model.stack.adapters():
        adapter.enabled = True


def batch_of(rows: Sequence[Way], routed: bool = True, seed: int = 3) -> Batch:
    ids = tokens(rows=len(rows), seed=seed)
    labels = ids.roll(-1, 1).masked_fill(torch.arange(ids.shape[1]) < 3, IGNORED)
    labels[:, -1] = IGNORED
    return replace(Batch.of(ids, labels), routes=Routes.of_rows(rows) if routed else None)


def part(batch: Batch, row: int) -> Batch:
    """One row of a batch, without its route."""
    return replace(replace(batch, micro_batch_size=1).microbatches()[row], routes=None)


def summed(model: GPT, batch: Batch) -> Tensor:
    output, read = model.forward_step(iter([batch]), model.chunks[0])
    return read(output)[0]


def gradients(model: GPT) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in adapter_parameters(model)}
    model.zero_grad()
    return found


def test_every_row_equals_a_run_with_its_own_adapters() -> None:
    model, batch = routed_model(), batch_of(ROWS)
    together = model.run_chunk(model.chunks[0], batch)
    for row, names in enumerate(ROWS):
        with alone(model, names):
            apart = model.run_chunk(model.chunks[0], part(batch, row))
        assert close(together[row], apart[0]), names
    everywhere = model.run_chunk(model.chunks[0], replace(batch, routes=None))
    assert not torch.allclose(together[1], everywhere[1], rtol=1e-2, atol=1e-2)  # the route is what makes it so


def test_rows_of_one_pack_go_different_ways() -> None:
    model, apart = routed_model(), batch_of(ROWS)
    length = apart.tokens.shape[1]
    line = Batch(
        tokens=apart.tokens.reshape(2, -1),
        labels=apart.labels.reshape(2, -1),
        position_ids=apart.position_ids.reshape(2, -1),
        cu_seqlens=(torch.arange(len(ROWS) // 2 + 1) * length).repeat(2, 1).to(torch.int32),
        routes=replace(apart.routes, chosen=apart.routes.chosen.expand(-1, length).reshape(2, -1)),
    )
    assert close(summed(model, line), summed(model, apart))
    packed = model.run_chunk(model.chunks[0], line.in_one_line()).reshape(len(ROWS), length, -1)
    assert close(packed, model.run_chunk(model.chunks[0], apart))


def test_every_adapter_gets_exactly_the_gradients_of_its_own_rows() -> None:
    model, batch = routed_model(), batch_of(ROWS)
    for chunk in model.chunks:
        chunk.double()  # so far from its start the model makes much of a rounding: up to 9e-4 in fp32, by processor
    summed(model, batch).backward()
    together = gradients(model)
    wanted = {name: torch.zeros_like(value) for name, value in together.items()}
    for row, names in enumerate(ROWS):
        with alone(model, names):
            summed(model, part(batch, row)).backward() if names != frozenset() else None
        for name, value in gradients(model).items():
            wanted[name] += value
    for name, value in together.items():
        assert value.abs().max() > 0 and close(value, wanted[name], 1e-11), name


def two_microbatches(model: GPT) -> dict[str, Tensor]:
    """Gradients where the second microbatch has run before the first one's layers are run again."""
    first, second = batch_of(ROWS), batch_of(ROWS[::-1], seed=4)
    losses = [summed(model, batch) for batch in (first, second)]
    for loss in losses:
        loss.backward()
    return gradients(model)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(close(value, other[name]) for name, value in one.items())


def test_recomputed_layers_go_the_way_of_their_own_microbatch() -> None:
    assert same(two_microbatches(routed_model(recompute="full")), two_microbatches(routed_model()))


@pytest.mark.fault(
    "the route of the microbatch at work is used when another one's layers are recomputed",
    "recomputation sees the context variables of its first run",
)
def test_a_route_that_is_forgotten_before_recomputation_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = two_microbatches(routed_model())
    keeping = tensor_parallel.checkpoint
    plain = next(cell.cell_contents for cell in keeping.__closure__ or () if callable(cell.cell_contents))
    monkeypatch.setattr(tensor_parallel, "checkpoint", plain)
    assert not same(two_microbatches(routed_model(recompute="full")), wanted)


def test_prompts_are_ids_and_need_no_route() -> None:
    """A row that is sent elsewhere holds no virtual tokens: its ids say so."""
    model = make().train()
    model.add_adapter([PTuning(virtual_tokens=3, embedding_dim=12, bottleneck_dim=10), LoRA(dim=4)])
    shake(model)
    prompt = model.prompt_layout.slots[0].ids
    ids = torch.cat([torch.tensor([prompt]), tokens(rows=1, length=6)], 1)
    both = replace(Batch.of(ids), routes=Routes.of_rows([way("ptuning")]))
    with alone(model, frozenset({"ptuning"})):
        wanted = model.run_chunk(model.chunks[0], Batch.of(ids))
    assert close(model.run_chunk(model.chunks[0], both), wanted)


def test_an_unknown_name_is_refused() -> None:
    model = routed_model()
    with pytest.raises(MatchError, match="no adapter 'lorra'; .*'lora'"):
        model.run_chunk(model.chunks[0], batch_of([way("lorra")]))


def test_a_merged_adapter_acts_on_all_rows_or_none() -> None:
    model = make()
    model.add_adapter([LoRA("lora", dim=4), LoRA("second", dim=2)])
    model.merge_adapters(["lora"])
    with pytest.raises(MatchError, match="LoRA 'lora' cannot act on some rows only: it is merged"):
        model.run_chunk(model.chunks[0], batch_of([way("second")]))
    model.run_chunk(model.chunks[0], batch_of([way(["lora", "second"]), None]))


def test_adapters_inside_experts_act_on_all_rows_or_none() -> None:
    model = make(sizes={"num_moe_experts": 4, "moe_router_topk": 2})
    model.add_adapter([LoRA("lora", dim=4), IA3("ia3", targets=["k", "v"])])
    with pytest.raises(MatchError, match="inside of experts tokens have lost their rows"):
        model.run_chunk(model.chunks[0], batch_of([way("ia3")]))
    model.run_chunk(model.chunks[0], batch_of([way("lora"), way(["lora", "ia3"])]))


def test_trained_tensors_of_the_base_act_on_all_rows_or_none() -> None:
    model = make()
    model.add_adapter([LoRA("lora", dim=4), Selective("norms", patterns=["norm"])])
    with pytest.raises(MatchError, match="'norms' cannot act on some rows only: it trains tensors of the base"):
        model.run_chunk(model.chunks[0], batch_of([way("lora")]))
