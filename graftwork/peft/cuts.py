"""How the base's linears are cut over tensor-parallel ranks, and how an adapter beside one is cut to fit.

All communication is on the low-rank tensor: a column-parallel base gets a replicated factor followed by a cut one, a
row-parallel base a cut factor followed by a replicated one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker, mappings
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from graftwork.parallel.fused import Parts, QKVRows
from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import tp_group, tp_size
from graftwork.peft.sites import Host, Site

GATED = "linear_fc1"
OUTPUT = "output_layer"
_BLOCK = 2**22
"""Largest number of a weight's values that are changed at once to find the norms of its rows (16 MiB in fp32)."""


@dataclass(frozen=True)
class Region:
    """The tensor-parallel region of a model: between ``enter`` and ``leave`` tensors are cut over ``size`` ranks.

    Inside experts, which every rank holds whole, ``size`` is 1 and nothing is sent. With ``sequence_parallel`` each
    rank holds its own part of the sequence outside of the region.
    """

    size: int = 1
    sequence_parallel: bool = False

    @classmethod
    def of(cls, config: TransformerConfig, expert: bool = False) -> "Region":
        """Return the region of a model's layers, or of one of its experts."""
        size = 1 if expert else tp_size()
        return cls(size, bool(config.sequence_parallel) and size > 1)

    @property
    def partial(self) -> bool:
        """Whether a replicated tensor outside of the region sees one part of the sequence: its gradient is partial."""
        return self.sequence_parallel

    @property
    def cut(self) -> bool:
        """Whether tensors inside of the region are cut at all."""
        return self.size > 1

    def enter(self, x: Tensor) -> Tensor:
        """Bring [s(/tp), b, n] into the region: [s, b, n], equal on all ranks; gradients are summed on the way back."""
        if not self.cut:
            return x
        group, gather = tp_group(), mappings.gather_from_sequence_parallel_region
        entered: Tensor = (
            gather(x, tensor_parallel_output_grad=True, group=group)
            if self.sequence_parallel
            else mappings.copy_to_tensor_model_parallel_region(x, group=group)
        )
        return entered

    def leave(self, x: Tensor) -> Tensor:
        """Bring partial sums [s, b, n] out of the region: summed, [s(/tp), b, n]."""
        if not self.cut:
            return x
        group = tp_group()
        left: Tensor = (
            mappings.reduce_scatter_to_sequence_parallel_region(x, group=group)
            if self.sequence_parallel
            else mappings.reduce_from_tensor_model_parallel_region(x, group=group)
        )
        return left

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's ``x``, without a gradient."""
        total = x.detach().clone()
        if self.cut:
            dist.all_reduce(total, group=tp_group())
        return total


@dataclass(frozen=True)
class Cut(ABC):
    """How one linear, ``inputs`` to ``outputs`` wide in full, is cut, and what that means for tensors beside it.

    A low-rank update has an *input factor* [rank, inputs], which reads what the base reads, and an *output factor*
    [outputs, rank], which adds to what the base returns. Both are replicated where a subclass does not cut them.
    """

    inputs: int
    outputs: int
    region: Region

    @abstractmethod
    def between(self, low: Tensor) -> Tensor:
        """Bring the input factor's result [..., rank] to the output factor."""

    def input_factor(self, rank: int) -> Sharding:
        """Return how a factor [rank, inputs] is cut."""
        return Sharding((rank, self.inputs))

    def output_factor(self, rank: int) -> Sharding:
        """Return how a factor [outputs, rank] is cut."""
        return Sharding((self.outputs, rank))

    def input_vector(self) -> Sharding:
        """Return how one value per input is cut."""
        return Sharding((self.inputs,))

    def output_vector(self) -> Sharding:
        """Return how one value per output is cut."""
        return Sharding((self.outputs,))

    @property
    def input_partial(self) -> bool:
        """Whether the input factor is replicated and sees only this rank's part of the sequence."""
        return self.region.partial

    @property
    def output_partial(self) -> bool:
        """Whether the output factor is replicated and sees only this rank's part of the sequence."""
        return self.region.partial

    @property
    def inputs_differ(self) -> bool:
        """Whether ranks hold different parts of the base's input, so that their dropout masks must differ."""
        return self.region.partial

    @property
    def outputs_differ(self) -> bool:
        """Whether ranks hold different parts of the base's output, so that their dropout masks must differ."""
        return self.region.partial

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the base's product of its input ``x`` and this rank's ``weight``, without a bias."""

    def part(self, outputs: int) -> "Cut":
        """Return the cut of one of the linears that were fused into this one, ``outputs`` wide."""
        return replace(self, outputs=outputs)

    def norm(self, weight: Tensor, change: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the fp32 L2 norm of every output row of this rank's ``weight`` [outputs, inputs], without a gradient.

        ``change``: factors B [outputs, r] and A [r, inputs]; the rows are those of ``weight + B A``. Rows are changed a
        block at a time and as they are, because sums of ``|W|^2``, ``W A^T`` and ``A A^T`` lose what cancels. It is the
        norm of the full row also where rows are cut: then all ranks of the region must ask for it together.
        """
        return self._whole(_row_squares(weight.detach(), change)).sqrt().float()

    def _whole(self, squares: Tensor) -> Tensor:
        """Return the sums of full rows from those of this rank's part."""
        return squares


@dataclass(frozen=True)
class ColumnCut(Cut):
    """Outputs are cut: each rank computes its own. ``blocks`` and ``padded`` (outputs with padding) as in Sharding."""

    blocks: int = 1
    padded: int | None = None

    def between(self, low: Tensor) -> Tensor:
        """Enter the region: [s(/tp), b, r] -> [s, b, r]."""
        return self.region.enter(low)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Enter the region and multiply: [s(/tp), b, inputs] -> [s, b, outputs / tp]."""
        return F.linear(self.region.enter(x), weight)

    def part(self, outputs: int) -> Cut:
        """Return the cut of one of the fused linears, which is a single block of rows."""
        return replace(self, outputs=outputs, blocks=1)

    def output_factor(self, rank: int) -> Sharding:
        """Return the factor's cut: that of the base's rows."""
        return Sharding((self.outputs, rank), dim=0, blocks=self.blocks, padded=self.padded)

    def output_vector(self) -> Sharding:
        """Return the vector's cut: that of the base's rows."""
        return Sharding((self.outputs,), dim=0, blocks=self.blocks, padded=self.padded)

    @property
    def output_partial(self) -> bool:
        """Never: the output factor is cut."""
        return False

    @property
    def outputs_differ(self) -> bool:
        """Whether there are several ranks."""
        return self.region.cut


@dataclass(frozen=True)
class RowCut(Cut):
    """Inputs are cut: each rank computes a partial sum of all outputs."""

    def between(self, low: Tensor) -> Tensor:
        """Leave the region: partial [s, b, r] -> summed [s(/tp), b, r]."""
        return self.region.leave(low)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply and leave the region: [s, b, inputs / tp] -> [s(/tp), b, outputs]."""
        return self.region.leave(F.linear(x, weight))

    def input_factor(self, rank: int) -> Sharding:
        """Return the factor's cut: that of the base's columns."""
        return Sharding((rank, self.inputs), dim=1)

    def input_vector(self) -> Sharding:
        """Return the vector's cut: that of the base's columns."""
        return Sharding((self.inputs,), dim=0)

    @property
    def input_partial(self) -> bool:
        """Never: the input factor is cut."""
        return False

    @property
    def inputs_differ(self) -> bool:
        """Whether there are several ranks."""
        return self.region.cut

    def _whole(self, squares: Tensor) -> Tensor:
        """Sum over all ranks' columns; collective over the region."""
        return self.region.sum(squares)


@dataclass(frozen=True)
class Replicated(Cut):
    """Every rank holds the whole linear, as inside experts, and (in a cut region) its part of the sequence."""

    def between(self, low: Tensor) -> Tensor:
        """Return ``low``: both factors see the same tokens."""
        return low

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply."""
        return F.linear(x, weight)


def cut_of(site: Site, host: Host) -> Cut:
    """Read how the linear at ``site``, megatron-core's or Transformer Engine's, is cut, and its full widths."""
    found = _cut_class(site.module)
    assert found is not None, f"{site.name} is no linear"
    region = Region.of(host.config, site.in_expert)
    outputs, inputs = _local_widths(site.module)
    if found is ColumnCut and not site.in_expert:
        blocks = 2 if site.leaf == GATED and host.config.gated_linear_unit else 1
        outputs *= region.size
        if site.leaf == OUTPUT:  # the layer's outputs may be padded
            return ColumnCut(inputs, host.vocab_size, region, blocks, padded=outputs)
        return ColumnCut(inputs, outputs, region, blocks)
    if found is RowCut and not site.in_expert:
        return RowCut(inputs * region.size, outputs, region)
    return Replicated(inputs, outputs, region)


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear that ``cut_of`` can read."""
    return _cut_class(module) is not None


def is_embedding(module: nn.Module) -> bool:
    """Tell whether a module is megatron-core's vocabulary embedding."""
    return isinstance(module, VocabParallelEmbedding)


def qkv_rows(config: TransformerConfig) -> QKVRows:
    """Return how the rows of the model's fused qkv linears are laid out."""
    assert config.num_query_groups is not None and config.kv_channels is not None
    return QKVRows(config.num_attention_heads, config.num_query_groups, config.kv_channels)


def parts_of(site: Site, host: Host) -> Parts | None:
    """Return the linears that were fused into the one at ``site`` (q, k and v; k and v; gate and up), None for one."""
    rows = qkv_rows(host.config)
    if site.leaf == "linear_qkv":
        return Parts(("linear_q", "linear_k", "linear_v"), tuple(rows.split_sizes), rows.width)
    if site.leaf == "linear_kv":  # of cross attention: each head's key and value
        return Parts(("linear_k", "linear_v"), (1, 1), rows.width)
    if site.leaf == GATED and host.config.gated_linear_unit:
        return Parts(("linear_fc1_gate", "linear_fc1_up"), (1, 1))
    return None


def drop(x: Tensor, probability: float, training: bool, differ: bool) -> Tensor:
    """Drop values; ranks that hold different parts (``differ``) draw different masks, ranks that hold the same one."""
    if not (training and differ):
        return F.dropout(x, probability, training)
    with get_cuda_rng_tracker().fork():
        return F.dropout(x, probability, True)


def _row_squares(weight: Tensor, change: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return every row's sum of squares; in fp64, so that its roundings do not depend on how rows are cut."""
    step = max(1, _BLOCK // weight.shape[1])
    blocks: Iterator[Tensor] = (rows.float() for rows in weight.split(step))
    if change is not None:
        left, right = (factor.detach().float() for factor in change)
        blocks = (torch.addmm(block, rows, right) for block, rows in zip(blocks, left.split(step)))
    return torch.cat([block.square().sum(dim=1, dtype=torch.float64) for block in blocks])


def _cut_class(module: nn.Module) -> type[Cut] | None:
    if isinstance(module, ColumnParallelLinear):
        return ColumnCut
    if isinstance(module, RowParallelLinear):
        return RowCut
    if hasattr(module, "parallel_mode") and hasattr(module, "in_features"):  # Transformer Engine's linears
        named: dict[str, type[Cut]] = {"column": ColumnCut, "row": RowCut}
        return named.get(str(module.parallel_mode), Replicated)
    return None


def _local_widths(module: nn.Module) -> tuple[int, int]:
    """Return this rank's (outputs, inputs); a tied output layer holds no weight of its own."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    assert isinstance(module, ColumnParallelLinear)
    return module.output_size_per_partition, module.input_size
