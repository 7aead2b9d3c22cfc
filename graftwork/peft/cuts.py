"""What an adapter must know of the base linear it wraps: how it is cut, its full widths, its regions.

All communication is on the low-rank tensor: a column-parallel base gets a replicated factor followed by a cut one, a
row-parallel base a cut factor followed by a replicated one.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import tp_group, tp_size

GATED = "linear_fc1"


@dataclass(frozen=True)
class LinearInfo:
    """A parallel linear's kind (``column``, ``row`` or ``replicated``), full input and output widths and layout."""

    kind: str
    inputs: int
    outputs: int
    blocks: int = 1
    padded_outputs: int | None = None
    sequence_parallel: bool = False
    parallel: bool = True

    def input_sharding(self, rank: int) -> Sharding:
        """Layout of a factor [rank, inputs] that reads the base's input."""
        return Sharding((rank, self.inputs), dim=1 if self.kind == "row" and self.parallel else None)

    def output_sharding(self, rank: int) -> Sharding:
        """Layout of a factor [outputs, rank] that adds to the base's output."""
        if self.kind != "column" or not self.parallel:
            return Sharding((self.outputs, rank))
        return Sharding((self.outputs, rank), dim=0, blocks=self.blocks, padded=self.padded_outputs)

    @property
    def sums_replicated(self) -> bool:
        """Whether the replicated factor sees only this rank's part of the sequence."""
        return self.sequence_parallel and self.parallel


def linear_kind(module: nn.Module) -> str | None:
    """Return ``column``, ``row`` or ``replicated`` for a (possibly Transformer Engine) linear, else None."""
    if isinstance(module, ColumnParallelLinear):
        return "column"
    if isinstance(module, RowParallelLinear):
        return "row"
    if hasattr(module, "parallel_mode") and hasattr(module, "in_features"):  # Transformer Engine's linears
        return {"column": "column", "row": "row"}.get(str(module.parallel_mode), "replicated")
    return None


def is_embedding(module: nn.Module) -> bool:
    """Tell whether a module is megatron-core's vocabulary embedding."""
    return isinstance(module, VocabParallelEmbedding)


def describe(module: nn.Module, leaf: str, in_expert: bool, config: object, vocab_size: int) -> LinearInfo:
    """Read a base linear's widths and layout; ``vocab_size`` is the real vocabulary (the layer's may be padded)."""
    kind = linear_kind(module)
    assert kind is not None
    size = 1 if in_expert else tp_size()
    out_local, in_local = local_widths(module)
    outputs = out_local * (size if kind == "column" else 1)
    is_output = leaf == "output_layer"
    return LinearInfo(
        kind=kind,
        inputs=in_local * (size if kind == "row" else 1),
        outputs=vocab_size if is_output else outputs,
        blocks=2 if leaf == GATED and getattr(config, "gated_linear_unit", False) else 1,
        padded_outputs=outputs if is_output else None,
        sequence_parallel=bool(getattr(config, "sequence_parallel", False)) and size > 1,
        parallel=not in_expert,
    )


def local_widths(module: nn.Module) -> tuple[int, int]:
    """Return this rank's (outputs, inputs); a tied output layer holds no weight of its own."""
    linear: Any = module
    if getattr(linear, "weight", None) is not None:
        return linear.weight.shape[0], linear.weight.shape[1]
    return linear.output_size_per_partition, linear.input_size


def into_column(low_rank: Tensor, info: LinearInfo) -> Tensor:
    """Enter the tensor-parallel region before a cut output factor: [s(/tp), b, r] -> [s, b, r]."""
    if not info.parallel or tp_size() == 1:
        return low_rank
    if info.sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(
            low_rank, tensor_parallel_output_grad=True, group=tp_group()
        )
    return mappings.copy_to_tensor_model_parallel_region(low_rank, group=tp_group())


def out_of_row(low_rank: Tensor, info: LinearInfo) -> Tensor:
    """Leave the tensor-parallel region after a cut input factor: partial [s, b, r] -> summed [s(/tp), b, r]."""
    if not info.parallel or tp_size() == 1:
        return low_rank
    if info.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(low_rank, group=tp_group())
    return mappings.reduce_from_tensor_model_parallel_region(low_rank, group=tp_group())
