"""Blueprint: a model with its adapters as a run would build it, drawn without memory, weights or other ranks."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from graftwork import parallel
from graftwork.errors import ParallelismError
from graftwork.models.base import Model
from graftwork.models.precision import DTYPES
from graftwork.models.recompute import recompute_fields
from graftwork.models.shapes import Shape, T5Shape
from graftwork.peft import PEFT


@dataclass(frozen=True)
class Blueprint:
    """What a run builds: ``kind`` of model, its sizes, ``dtype`` (fp32 or bf16), recomputation, the stack."""

    kind: type[Model]
    shape: Shape
    dtype: str
    recompute: str | None = None
    transforms: Sequence[PEFT] = ()

    @property
    def width(self) -> int:
        """Bytes of one value of the base."""
        return DTYPES[self.dtype].itemsize

    def draft(self) -> Model:
        """Return the model on the meta device, adapters attached, ready to train; inside of ``world_of_one``.

        Raises GraftworkError for transforms that do not fit the model.
        """
        model = self.kind(self.shape, dtype=self.dtype, recompute=self.recompute)
        dtype = DTYPES[self.dtype]
        config = self.shape.transformer_config(
            params_dtype=dtype,
            pipeline_dtype=dtype,
            perform_initialization=False,
            use_cpu_initialization=True,
            **recompute_fields(self.recompute),
        )
        with torch.device("meta"):
            model.module = model.build_chunk(config, None)
            _move_constants(model.module)
            for transform in self.transforms:
                # as if its values were loaded: an initial text has no tokenizer here
                model.stack.add(copy.deepcopy(transform), loaded=True)
        model.train()
        return model

    def shallow(self) -> "Blueprint":
        """Return the same model with one layer in each part."""
        shape = replace(self.shape, num_layers=1)
        return replace(self, shape=replace(shape, num_decoder_layers=1) if isinstance(shape, T5Shape) else shape)

    def cut(self, ranks: int, sequence_parallel: bool = False) -> "Blueprint":
        """Return a model that has on one rank what one of ``ranks`` tensor-parallel ranks has."""
        if ranks == 1:
            return self
        whole, width = self.shape, self.shape.ffn_hidden_size // ranks
        # Under sequence parallelism tensors of the hidden size are told by it: the MLP must not have that size too.
        width += sequence_parallel and width == whole.hidden_size
        shape = replace(
            whole,
            kv_channels=whole.channels,
            num_attention_heads=whole.num_attention_heads // ranks,
            num_query_groups=whole.groups // ranks,
            ffn_hidden_size=width,
            vocab_size=whole.padded_vocab_size(ranks) // ranks,
        )
        return replace(self, shape=shape)


@contextmanager
def world_of_one() -> Iterator[None]:
    """Make this process a parallel world of its own inside the block, and leave no trace of it.

    Raises ParallelismError in a process that belongs to a larger one.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ParallelismError("a plan is made in one process, outside of a run; this one is a rank of several.")
    mine = not parallel.is_initialized()
    with torch.random.fork_rng(devices=[]):
        try:
            parallel.ensure_initialized()
            yield
        finally:
            if mine:
                parallel.destroy()


def _move_constants(module: nn.Module) -> None:
    """Move what the parts compute at birth (rotary frequencies) to where the parameters are."""
    for part in module.modules():
        for holder in (vars(part), part._buffers):
            for name, value in list(holder.items()):
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    holder[name] = value.to("meta")
