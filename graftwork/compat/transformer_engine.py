"""transformer-engine: used with CUDA when it works, hidden from megatron-core otherwise.

megatron-core guards ``import transformer_engine`` against ImportError only. The empty meta package from the registry
and wheels whose CUDA libraries are missing raise RuntimeError or OSError instead, so ``import megatron.core`` itself
would fail. A ``None`` entry in ``sys.modules`` is Python's own way to say "not importable".
"""

import importlib
import sys
from dataclasses import dataclass

import torch

# What a broken install raises: absent (ImportError), empty meta package (RuntimeError), missing shared library
# (OSError), extension built for another torch (AttributeError), unsupported device (AssertionError).
BROKEN = (ImportError, RuntimeError, OSError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Status:
    """Whether transformer-engine is used, and why not."""

    usable: bool
    reason: str


_status: Status | None = None


def guard() -> Status:
    """Decide once whether transformer-engine can be used; when not, make it look absent to every later import."""
    global _status
    if _status is None:
        _status = _probe()
        if not _status.usable:
            _hide()
    return _status


def usable() -> bool:
    """Return True when CUDA is present and transformer-engine imports."""
    return guard().usable


def name_absentees() -> None:
    """Bind the name that megatron-core 0.16 reads in every router, but binds only with transformer-engine."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _probe() -> Status:
    if not torch.cuda.is_available():
        return Status(False, "there is no CUDA device")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except BROKEN as error:
        return Status(False, f"{type(error).__name__}: {error}")
    return Status(True, "")


def _hide() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("transformer_engine", "transformer_engine_torch")]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
