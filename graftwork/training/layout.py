"""The parallel layout as a user names it, and the arithmetic that refuses it before anything is built."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from graftwork.errors import ParallelismError


@dataclass(frozen=True)
class Layout:
    """Number of ranks along every axis, under the names of the recipe's fields."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        """Refuse what no number of devices could make right."""
        for name, value in asdict(self).items():
            if name != "sequence_parallel" and value is not None and not (isinstance(value, int) and value >= 1):
                raise ParallelismError(f"{name}={value!r} must be a whole number of at least 1.")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ParallelismError("sequence_parallel=True needs tensor_model_parallel_size > 1; it is 1.")
        if self.virtual_pipeline_model_parallel_size is not None and self.pipeline_model_parallel_size == 1:
            raise ParallelismError(
                "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1; it is 1."
            )

    @property
    def stages(self) -> int:
        """Pipeline stages, virtual ones included."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    @property
    def model_ranks(self) -> int:
        """Ranks that share one row of the batch: tensor x pipeline x context."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def pad_to_multiple(self) -> int:
        """What the sequence length must be a multiple of, so that every rank gets an equal part."""
        sequence = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return sequence * (2 * self.context_parallel_size if self.context_parallel_size > 1 else 1)

    def data_parallel_size(self, world: int) -> int:
        """Return the number of model replicas among ``world`` ranks; ParallelismError when they do not fit."""
        if world % self.model_ranks:
            raise ParallelismError(
                f"{world} device(s) cannot be laid out: tensor_model_parallel_size={self.tensor_model_parallel_size} x "
                f"pipeline_model_parallel_size={self.pipeline_model_parallel_size} x "
                f"context_parallel_size={self.context_parallel_size} needs a multiple of {self.model_ranks} "
                "(trainer.devices x trainer.num_nodes)."
            )
        holders = world // self.pipeline_model_parallel_size
        if holders % self.expert_model_parallel_size:
            raise ParallelismError(
                f"expert_model_parallel_size={self.expert_model_parallel_size} must divide the {holders} rank(s) of a "
                f"pipeline stage; valid: {_divisors(holders)}."
            )
        return world // self.model_ranks

    def check_shape(self, shape: Any) -> None:
        """Raise ParallelismError naming the field that does not fit the model ``shape``."""
        for field in ("num_attention_heads", "groups", "ffn_hidden_size"):
            self._check_tensor(field.replace("groups", "num_query_groups"), getattr(shape, field))
        if shape.num_layers % self.stages:
            raise ParallelismError(
                f"pipeline_model_parallel_size={self.pipeline_model_parallel_size} x "
                f"virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size or 1} must divide "
                f"num_layers={shape.num_layers}."
            )
        self._check_experts(shape.num_moe_experts)

    def check_batch(self, global_batch_size: int, micro_batch_size: int, world: int) -> int:
        """Return the microbatches per step and data-parallel rank; ParallelismError naming the field."""
        replicas = self.data_parallel_size(world)
        if global_batch_size % (micro_batch_size * replicas):
            raise ParallelismError(
                f"global_batch_size={global_batch_size} must be a multiple of micro_batch_size={micro_batch_size} x "
                f"{replicas} data-parallel rank(s) = {micro_batch_size * replicas}."
            )
        count = global_batch_size // (micro_batch_size * replicas)
        if self.virtual_pipeline_model_parallel_size is not None and count % self.pipeline_model_parallel_size:
            raise ParallelismError(
                f"with virtual_pipeline_model_parallel_size the {count} microbatches of a step must be a multiple of "
                f"pipeline_model_parallel_size={self.pipeline_model_parallel_size}: change global_batch_size."
            )
        return count

    def check_packing(self, seq_length: int) -> None:
        """Raise ParallelismError naming the field unless packed rows can be cut over the ranks of a sequence."""
        if self.context_parallel_size > 1:
            raise ParallelismError(
                f"context_parallel_size={self.context_parallel_size} cannot cut packed rows: "
                "set packing=False or context_parallel_size=1."
            )
        if seq_length % self.pad_to_multiple:
            raise ParallelismError(
                f"with packing and sequence_parallel=True seq_length={seq_length} must be a multiple of "
                f"tensor_model_parallel_size={self.tensor_model_parallel_size}."
            )

    def transformer_fields(self) -> dict[str, Any]:
        """Return the fields of megatron-core's TransformerConfig that follow from the layout."""
        fields = asdict(self)
        if self.virtual_pipeline_model_parallel_size is not None:
            # Batched point-to-point delivers garbage without an error between two interleaved stages.
            fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        return fields

    def _check_tensor(self, field: str, value: int) -> None:
        if value % self.tensor_model_parallel_size:
            raise ParallelismError(
                f"tensor_model_parallel_size={self.tensor_model_parallel_size} must divide {field}={value}; "
                f"valid: {_divisors(value)}."
            )

    def _check_experts(self, experts: int | None) -> None:
        size = self.expert_model_parallel_size
        if size > 1 and experts is None:
            raise ParallelismError(f"expert_model_parallel_size={size} needs a model with experts; valid: 1.")
        if experts is not None and experts % size:
            raise ParallelismError(
                f"expert_model_parallel_size={size} must divide num_moe_experts={experts}; valid: {_divisors(experts)}."
            )
        if experts is not None and self.tensor_model_parallel_size > 1 and not self.sequence_parallel:
            raise ParallelismError(
                "a model with experts trains with tensor_model_parallel_size > 1 only if sequence_parallel=True."
            )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
