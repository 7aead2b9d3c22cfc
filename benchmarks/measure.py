"""Clocks: interleaved repetitions with minima in this process, peak memory in a child process of its own."""

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

import torch

TRL = find_spec("trl") is not None
PACKAGES = ("torch", "megatron-core", "lightning", "transformers", "peft")


def interleaved(contestants: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Return the least seconds of each callable; every round calls all, in random order, so that a busy spell of the
    machine meets both sides."""
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    best = dict.fromkeys(order, float("inf"))
    for _ in range(repetitions):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            contestants[name]()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


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
