"""What a device can do at most: memory, arithmetic, bandwidth. GPUs as their makers publish them, this CPU measured."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from graftwork.errors import ConfigError, suggest

CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """One device: bytes of memory, dense FLOP/s by dtype, bytes/s of its memory and, one way, to its neighbours.

    ``link``: to devices of the same node; ``network``: to other nodes. ``runtime``: bytes that a process takes before
    it holds a model. ``at_once``: the optimizer steps all tensors together.
    """

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    link: float
    network: float
    runtime: float
    at_once: bool = True


CUDA_RUNTIME = 1.5e9
"""CUDA context, cuBLAS workspaces and NCCL's buffers: an estimate, not measured here."""
CPU_RUNTIME = 30e6
"""Process group, trainer, code that is read at first use, blocks in pieces: measured by benchmarks/memory.py."""

DEVICES = {
    # data sheets of the SXM boards; dense, without sparsity; fp32 without tensor cores
    "A100": Device("A100", 80e9, {"bf16": 312e12, "fp32": 19.5e12}, 2.039e12, 300e9, 25e9, CUDA_RUNTIME),
    "H100": Device("H100", 80e9, {"bf16": 989.4e12, "fp32": 66.9e12}, 3.35e12, 450e9, 50e9, CUDA_RUNTIME),
    "H200": Device("H200", 141e9, {"bf16": 989.4e12, "fp32": 66.9e12}, 4.8e12, 450e9, 50e9, CUDA_RUNTIME),
    "B200": Device("B200", 180e9, {"bf16": 2250e12, "fp32": 75e12}, 7.7e12, 900e9, 50e9, CUDA_RUNTIME),
}
"""By the name that ``plan`` takes."""


def device_named(name: str) -> Device:
    """Return a device by its name, in any case; ``cpu`` is this machine, measured. Raises ConfigError for others."""
    known = {key.lower(): device for key, device in DEVICES.items()}
    if name.lower() == CPU:
        return this_cpu()
    if name.lower() not in known:
        raise ConfigError(f"device is {name!r}; {suggest(name, [*DEVICES, CPU])}")
    return known[name.lower()]


def this_gpu() -> Device:
    """Return this machine's first GPU with the memory that it has; one of an unknown name is as fast as an A100."""
    found = torch.cuda.get_device_properties(0)
    known = next((device for name, device in DEVICES.items() if name in found.name), DEVICES["A100"])
    return replace(known, name=found.name, memory=float(found.total_memory))


def this_cpu() -> Device:
    """Return this machine's CPU with the speed that its matrix products and copies have now, in a tenth of a second."""
    flops = {name: _matmul(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    copied = torch.empty(2**23)
    speed = 2 * copied.nbytes / _seconds(copied.clone)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(CPU, memory, flops, speed, speed, speed, CPU_RUNTIME, at_once=False)


def _matmul(dtype: torch.dtype, size: int = 384) -> float:
    left = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / _seconds(lambda: left @ left)


def _seconds(work: Callable[[], object], least: float = 0.02) -> float:
    work()
    best, until = float("inf"), time.perf_counter() + least
    while time.perf_counter() < until:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
