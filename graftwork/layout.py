"""The parallel layout as a user names it, and all arithmetic that refuses it before anything is built."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

from graftwork.errors import ParallelismError


class Dimensions(Protocol):
    """What a layout must know of a model's shape."""

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """Number of query heads."""
        ...

    @property
    def groups(self) -> int:
        """Number of key/value heads."""
        ...

    @property
    def ffn_hidden_size(self) -> int:
        """Width of the MLP."""
        ...

    @property
    def num_moe_experts(self) -> int | None:
        """Number of experts, None for a dense model."""
        ...

    @property
    def undivided(self) -> bool:
        """Whether layers and sequences must stay whole on a rank, as in an encoder-decoder."""
        ...


class TransformerFields(Protocol):
    """The fields of megatron-core's TransformerConfig that can contradict each other without an error."""

    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    num_moe_experts: int | None
    expert_tensor_parallel_size: int | None
    overlap_p2p_comm: bool
    batch_p2p_comm: bool
    fp32_residual_connection: bool
    params_dtype: Any
    pipeline_dtype: Any


@dataclass(frozen=True)
class Layout:
    """Number of ranks along every axis, under the names of the recipe's fields.

    Experts are never cut over tensor-parallel ranks (gloo cannot gather uneven parts): expert tensor parallelism is 1.
    """

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

    @classmethod
    def among(cls, values: Mapping[str, Any]) -> "Layout":
        """Take the layout's fields out of ``values`` (fields of TransformerConfig); absent ones keep their defaults."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    @property
    def groups_only(self) -> "Layout":
        """The layout as far as process groups go: sequence parallelism needs none of its own."""
        return replace(self, sequence_parallel=False)

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

    def check_shape(self, shape: Dimensions) -> None:
        """Raise ParallelismError naming the field that does not fit the model ``shape``."""
        self._check_undivided(shape)
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
        if seq_length % self.pad_to_multiple:
            parts = (
                [f"2 x context_parallel_size={self.context_parallel_size}"] if self.context_parallel_size > 1 else []
            )
            parts += [f"tensor_model_parallel_size={self.tensor_model_parallel_size}"] if self.sequence_parallel else []
            raise ParallelismError(
                f"seq_length={seq_length} must be a multiple of {' x '.join(parts)}, over which packed rows are cut; "
                f"valid: multiples of {self.pad_to_multiple}."
            )

    def check_transformer(self, shape: Dimensions) -> None:
        """Raise ParallelismError unless one TransformerConfig can describe ``shape`` in this layout."""
        self._check_undivided(shape)
        tensor, stages = self.tensor_model_parallel_size, self.stages
        valid = valid_tensor_sizes(shape)
        if tensor not in valid:
            raise ParallelismError(f"tensor_model_parallel_size={tensor} does not fit this model; valid: {valid}.")
        if shape.num_layers % stages:
            raise ParallelismError(
                f"{stages} pipeline stages do not divide the {shape.num_layers} layers; "
                f"valid: {_divisors(shape.num_layers)}."
            )

    def transformer_fields(self) -> dict[str, Any]:
        """Return the fields of megatron-core's TransformerConfig that follow from the layout."""
        # Batched point-to-point delivers garbage without an error between two interleaved stages.
        interleaved = self.virtual_pipeline_model_parallel_size is not None
        return {
            **asdict(self),
            "overlap_p2p_comm": interleaved,
            "batch_p2p_comm": not interleaved,
            "expert_tensor_parallel_size": 1,
        }

    def _check_undivided(self, shape: Dimensions) -> None:
        if not shape.undivided:
            return
        for field in ("pipeline_model_parallel_size", "context_parallel_size"):
            if getattr(self, field) > 1:
                raise ParallelismError(
                    f"{field}={getattr(self, field)} cannot divide an encoder-decoder; 1 is valid: divide it with "
                    "tensor_model_parallel_size."
                )

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


def valid_tensor_sizes(shape: Dimensions) -> list[int]:
    """Tensor-parallel sizes that divide the attention heads, the query groups and the MLP width."""
    heads, width = shape.num_attention_heads, shape.ffn_hidden_size
    return [n for n in _divisors(shape.groups) if heads % n == 0 and width % n == 0]


def check_deal(global_batch_size: int, micro_batch_size: int, replicas: int) -> None:
    """Raise ParallelismError unless the global batch falls into whole microbatches on every data-parallel rank."""
    if global_batch_size % (micro_batch_size * replicas):
        raise ParallelismError(
            f"global_batch_size={global_batch_size} cannot be dealt to {replicas} data-parallel ranks in "
            f"microbatches of {micro_batch_size}; it must be a multiple of {micro_batch_size * replicas}."
        )


def check_packed_length(seq_length: int, multiple: int) -> None:
    """Raise ParallelismError unless packed rows can be cut over the ranks of a sequence."""
    if seq_length % multiple:
        raise ParallelismError(
            f"packed rows of seq_length={seq_length} cannot be cut for sequence or context parallelism; "
            f"seq_length must be a multiple of {multiple}."
        )


def refuse_silent_garbage(config: TransformerFields) -> None:
    """Raise ParallelismError for what megatron-core accepts but computes wrongly, naming the field."""
    stages, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if config.num_moe_experts is not None and config.expert_tensor_parallel_size != 1:
        raise ParallelismError(
            f"expert_tensor_parallel_size={config.expert_tensor_parallel_size} must be 1: experts are never cut over "
            "tensor-parallel ranks here; spread them with expert_model_parallel_size."
        )
    if stages == 2 and virtual is not None and not (config.overlap_p2p_comm and not config.batch_p2p_comm):
        raise ParallelismError(
            "virtual_pipeline_model_parallel_size with pipeline_model_parallel_size=2 needs overlap_p2p_comm=True and "
            "batch_p2p_comm=False: batched messages between two interleaved stages mix up what they carry."
        )
    sent = "torch.float32" if config.fp32_residual_connection else str(config.params_dtype)
    if stages > 1 and str(config.pipeline_dtype) != sent:
        raise ParallelismError(
            f"pipeline_dtype={config.pipeline_dtype} must be {sent}, the dtype of the activations between "
            "stages: the receiving stage would read other numbers."
        )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
