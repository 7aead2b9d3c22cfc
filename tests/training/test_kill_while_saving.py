"""A kill at any moment, also inside a save, leaves whole training states and nothing else that counts."""

import os
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from graftwork.compat import parallel
from graftwork.training import checkpoint
from graftwork.training.layout import Layout
from graftwork.training.run_directory import latest, prune, state_path

KILLS = 20


def trained() -> tuple[Any, torch.optim.Optimizer]:
    """Return a model of 2 MB with an optimizer that has stepped once."""
    parallel.ensure_initialized()
    module = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 600))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    module(torch.ones(300)).sum().backward()
    optimizer.step()
    return SimpleNamespace(module=module), optimizer


def mark(model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the step into every number of the state, so that parts of two states never look like one."""
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(step)
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][key].fill_(step)


def save_forever(root: str) -> None:
    """Save state after state until killed."""
    torch.set_num_threads(1)
    model, optimizer = trained()
    found = latest(Path(root))
    step = int(found.name[5:]) if found else 0
    while True:
        step += 1
        mark(model, optimizer, step)
        checkpoint.save(state_path(Path(root), step), {"global_step": step}, model, [optimizer], Layout())
        prune(Path(root), keep=2)


def loaded_step(path: Path) -> int:
    """Load a state and return its step, which every number of it must tell."""
    model, optimizer = trained()
    common, state = checkpoint.read_common(path)
    checkpoint.read_weights(path, state, model)
    checkpoint.read_optimizer(path, state, model, optimizer)
    values = list(model.module.parameters()) + [
        optimizer.state[p][k] for p in model.module.parameters() for k in ("exp_avg", "exp_avg_sq")
    ]
    assert {float(v.detach().flatten()[i]) for v in values for i in (0, -1)} == {float(common["global_step"])}
    return common["global_step"]


@pytest.mark.slow
@pytest.mark.processes
def test_every_visible_state_is_whole_after_random_kills(tmp_path: Path) -> None:
    context, moments, before, unfinished = get_context("forkserver"), random.Random(0), 0, 0
    context.set_forkserver_preload(["graftwork.training.checkpoint"])
    for _ in range(KILLS):
        process = context.Process(target=save_forever, args=(str(tmp_path),))
        process.start()
        deadline = time.monotonic() + 60
        while (now := latest(tmp_path)) is None or int(now.name[5:]) <= before:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        unfinished += any(p.name.startswith(".") for p in (tmp_path / "checkpoints").iterdir())
        found = loaded_step(latest(tmp_path))  # type: ignore[arg-type]
        assert found > before
        before = found
    assert unfinished >= 3, "the kills must also hit saves"
