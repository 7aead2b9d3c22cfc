"""What a context-parallel rank holds of a step of long rows, measured: `python -m tests.parallel.context_memory`."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graftwork import parallel
from graftwork.batch import IGNORED, Batch
from graftwork.models import GPT
from graftwork.models.shapes import Shape
from graftwork.peft import LoRA
from graftwork.training.schedule import run_schedule
from tests.contracts.methods import shape
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.live import LiveBytes

SIZES = (1, 2, 4)


@dataclass(frozen=True)
class Held:
    """Bytes on a rank: between forward and backward, and at most at one moment, beside weights."""

    saved: int
    peak: int


def packed(lengths: Iterable[int], tail: int = 0) -> Batch:
    """Return one packed row: tokens are numbers of their own, every token but a sample's last has a target."""
    lengths = list(lengths)
    ends = torch.cat([torch.arange(n) == n - 1 for n in [*lengths, 0]])
    labels = torch.cat([torch.full(ends.shape, 7).masked_fill(ends, IGNORED), torch.full((tail,), IGNORED)])[None]
    return Batch(
        tokens=torch.arange(1, sum(lengths) + tail + 1)[None],
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in [*lengths, tail]])[None],
        cu_seqlens=torch.tensor([[0, *lengths, *([tail] if tail else [])]]).cumsum(1).to(torch.int32),
    )


def small(length: int, **sizes: int) -> Shape:
    """Return a Llama of four layers for rows of ``length`` tokens."""
    values: dict[str, Any] = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 160, "vocab_size": 64}
    return shape(max_position_embeddings=length, **values | sizes)


def every_size(rank: int, world: int, sizes: Shape, lengths: list[int], tail: int) -> dict[tuple[int, bool], Held]:
    """Return what this rank holds, by number of context-parallel ranks, of padded and of packed rows."""
    found = {}
    for size in SIZES:
        parallel.initialize(layout_of(context=size))
        model = GPT(sizes, dtype="fp32")
        model.configure_model()
        model.add_adapter(LoRA(dim=4))
        model.train()
        row = packed(lengths, tail)
        row = replace(row, tokens=row.tokens % sizes.vocab_size)
        for is_packed, batch in ((False, Batch.of(row.tokens, row.labels)), (True, row)):
            _held(model, batch)  # fills caches of the rotary positions
            found[size, is_packed] = _held(model, batch)
    return found


def _held(model: GPT, batch: Batch) -> Held:
    saved: list[int] = []

    def forward_step(iterator: Any, chunk: nn.Module) -> Any:
        output, loss = model.forward_step(iterator, chunk)
        saved.append(tape.live)
        return output, loss

    with LiveBytes() as tape:
        run_schedule(forward_step, model.chunks, batch, forward_only=False)
    return Held(saved[0], tape.peak)


def main() -> None:
    """Print the largest rank's figures for rows of 4,096 tokens."""
    lengths = [1500, 1250, 700, 450, 130, 31]
    sizes = small(4096, hidden_size=256, ffn_hidden_size=688)
    ranks = run_ranks(every_size, max(SIZES), sizes, lengths, 4096 - sum(lengths), timeout=600)
    for is_packed in (False, True):
        one = ranks[0][1, is_packed]
        for size in SIZES:
            saved, peak = (max(getattr(rank[size, is_packed], name) for rank in ranks) for name in ("saved", "peak"))
            print(
                f"CP{size} {'packed' if is_packed else 'padded'}: {saved / 1e6:.1f} MB held ({saved / one.saved:.3f}), "
                f"{peak / 1e6:.1f} MB at the peak ({peak / one.peak:.3f})"
            )


if __name__ == "__main__":
    main()
