"""Base precision: ``fp32``, ``bf16`` (bf16 base, fp32 adapters, no autocast), or what the machine does fast."""

from pathlib import Path

import torch

from graftwork.errors import ConfigError, quoted, suggest
from graftwork.models.weights import read_config
from graftwork.parallel.collective import agreed, all_gather_objects

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def resolve_dtype(dtype: str | None, checkpoint: Path | None) -> torch.dtype:
    """Return the base's torch dtype; None means the checkpoint's own, ``auto`` what this machine does fast.

    Raises ConfigError for another name, or when the checkpoint's own dtype (fp16) is not supported.
    """
    if dtype == "auto":
        return torch.bfloat16 if bf16_is_fast() else torch.float32
    if dtype is None:
        return _checkpoint_dtype(checkpoint)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; {suggest(dtype, [*DTYPES, 'auto'])}")
    return DTYPES[dtype]


def common_dtype(dtype: str | None, checkpoint: Path | None) -> torch.dtype:
    """Return ``resolve_dtype``, the same on every rank; raises ConfigError on all of them when they differ.

    A pipeline stage would read the other dtype's bytes as its own numbers without an error.
    """
    found = all_gather_objects(agreed(lambda: resolve_dtype(dtype, checkpoint)))
    if len(set(found)) > 1:
        ranks = ", ".join(f"rank {found.index(one)}: {_name(one)}" for one in dict.fromkeys(found))
        raise ConfigError(f"dtype {dtype!r} means different things on different machines ({ranks}); name one dtype.")
    return found[0]


def bf16_is_fast() -> bool:
    """Tell whether bf16 matrix products run in hardware here (a GPU of Ampere or later, avx512_bf16 or AMX)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _checkpoint_dtype(checkpoint: Path | None) -> torch.dtype:
    if checkpoint is None or not (checkpoint / "config.json").is_file():
        return torch.float32
    config = read_config(checkpoint)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(
            f"The checkpoint {str(checkpoint)!r} is in {quoted(name, bare=True)}; choose dtype='bf16' or dtype='fp32'."
        )
    return DTYPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
