"""The same numbers on both devices: a reference from the CPU, written to files, and what a device makes of them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_cases
import torch
from gpu_cases import CASES, Case
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork import models

FIGURES = "figures.safetensors"
TOLERANCES = {"logits": 2e-5, "loss": 1e-5, "gradient": 2e-4}
"""Furthest that fp32 values of two devices may be apart, relative to the largest; TF32 is off."""
QUIET = 1e-3
"""A gradient's scale is at least this part of the largest of its model: a gradient of zero has no scale of its own."""
CURVE_STEPS, CURVE_TOLERANCE = 30, 0.1
"""Steps of the bf16 curve, and how far its losses may be from fp32's, relative to these."""


def write_reference(folder: Path, cases: Sequence[Case] = CASES) -> None:
    """Write bases, adapters and their figures, computed by this process, which sees no GPU."""
    for kind in dict.fromkeys(case.kind for case in cases):
        gpu_cases.build(kind).export_hf(folder / kind)
    for case in cases:
        model = models.load(folder / case.kind, dtype="fp32")
        gpu_cases.graft(model, case.stack)
        place = folder / case.place
        place.mkdir()
        if model.adapters:
            model.save_adapters(place / "adapter")
        save_file(gpu_cases.record(model), place / FIGURES)


def reference_process(folder: Path, script: Path) -> "subprocess.Popen[str]":
    """Start ``write_reference`` in a process that sees no GPU: megatron-core is patched there, and only there."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), "--reference", str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def compare(folder: Path, cases: Sequence[Case] = CASES) -> Iterator[dict[str, Any]]:
    """Yield, for each case, how far this process's device is from the reference, and whether that is near enough."""
    for case in cases:
        found = gpu_cases.record(gpu_cases.load(case, folder))
        wanted = load_file(folder / case.place / FIGURES)
        apart = furthest(found, wanted)
        yield {"case": case.name, **apart, "ok": all(apart[what] <= most for what, most in TOLERANCES.items())}


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest relative difference of logits, losses and gradients; infinite where names or sizes differ."""
    largest = max(
        (value.abs().max().item() for name, value in wanted.items() if name.startswith("gradient")), default=0
    )
    apart = dict.fromkeys(TOLERANCES, 0.0)
    if found.keys() != wanted.keys():
        return dict.fromkeys(TOLERANCES, float("inf"))
    for name, value in wanted.items():
        what = name.split()[0]
        if found[name].shape != value.shape:
            return dict.fromkeys(TOLERANCES, float("inf"))
        scale = max(value.abs().max().item(), largest * QUIET if what == "gradient" else 0.0, 1e-30)
        difference = (found[name] - value).abs().max().item() / scale
        apart[what] = max(apart[what], difference if difference == difference else float("inf"))
    return apart


def bf16_curve(folder: Path) -> dict[str, Any]:
    """Train a LoRA in fp32 and in bf16 on one batch; return both curves and how far they are apart."""
    curves = {dtype: _losses(gpu_cases.load(Case("gpt", "lora"), folder, dtype)) for dtype in ("fp32", "bf16")}
    apart = max(abs(a - b) / b for a, b in zip(curves["bf16"], curves["fp32"]))
    return {**curves, "furthest": apart, "ok": apart <= CURVE_TOLERANCE and curves["bf16"][-1] < curves["bf16"][0]}


def attention_kernels(folder: Path) -> dict[str, list[str]]:
    """Return the names of the kernels that attention ran, for padded and for packed rows in bf16."""
    from graftwork.batch import Batch

    model = gpu_cases.load(Case("gpt", "lora"), folder, "bf16")
    device = next(model.chunks[0].parameters()).device
    ids = torch.randint(200, (2, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    padded = Batch.of(ids, labels)
    packed = Batch(ids, labels, torch.arange(32).repeat(2, 2), torch.tensor([[0, 32, 64]] * 2, dtype=torch.int32))
    return {name: _kernels(model, batch.to(device)) for name, batch in (("padded", padded), ("packed", packed))}


def _losses(model: gpu_cases.Model) -> list[float]:
    from graftwork.optim import AdamW

    batch = model.lay_out([[7, 3, 9, 1]] * 2, [[5, 4, 8], [2, 6]], next(model.chunks[0].parameters()).device)
    optimizer, _ = AdamW(lr=2e-3, schedule="constant").build(model, CURVE_STEPS)
    model.train()
    losses = []
    for _ in range(CURVE_STEPS):
        output, loss_of = model.forward_step(iter([batch]), model.chunks[0])
        total, count, _ = loss_of(output)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / count))
    return losses


def _kernels(model: gpu_cases.Model, batch: Any) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds) as seen:
        output, loss_of = model.forward_step(iter([batch]), model.chunks[0])
        loss_of(output)[0].backward()
    words = ("flash", "fmha", "attention", "cudnn_sdpa", "mem_eff")
    return sorted({event.key[:100] for event in seen.key_averages() if any(word in event.key for word in words)})
