"""Clocks: interleaved rounds in this process and what pairs of them say, peak memory in a child process of its own."""

import os
import platform
import random
import resource
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch

TRL = find_spec("trl") is not None
PACKAGES = ("torch", "megatron-core", "lightning", "transformers", "peft")


def interleaved(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each callable, round by round; every round calls all, in random order, so that a busy
    spell of the machine meets both sides."""
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    found: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            contestants[name]()
            found[name].append(time.perf_counter() - started)
    return found


def quartiles(ours: list[float], peer: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of how many times as long the peer took, round by round.

    A spell of a neighbour's lasts longer than a round and meets both sides of a pair; a least time is one lucky spell.
    """
    ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    low, middle, high = numpy.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return low, middle, high


def peak_memory(side: str, case: str, checkpoint: Path, given: Namespace) -> dict[str, float]:
    """Return MB at the peak of imports, of building and of three steps, in a fresh process."""
    script = Path(__file__).with_name("step_time.py")
    options = ["--child", side, case, str(checkpoint), "--model", given.model, *(["--quick"] if given.quick else [])]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the child process for {side} {case} failed:\n{done.stderr[-2000:]}")
    names = ("imports_mb", "ready_mb", "peak_mb")
    return dict(zip(names, (float(x) for x in done.stdout.split()[-3:]), strict=True))


def resident_mb() -> float:
    """Return this process's peak resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def machine() -> dict[str, Any]:
    """Return what a reader must know to compare figures."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "bf16_in_hardware": bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in (*PACKAGES, *(["trl"] if TRL else []))},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
