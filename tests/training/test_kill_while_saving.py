"""A kill at any moment, also inside a save, leaves whole training states and nothing else that counts."""

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from graftwork import parallel
from graftwork.layout import Layout
from graftwork.training.optimizer import Update
from graftwork.training.optimizer.shards import chunks_of
from graftwork.training.run_directory import latest, prune, state_path, states
from graftwork.training.state import checkpoint
from tests.helpers.lightning_state import lightning_state

KILLS = 20
PATIENCE = 600
"""Seconds that a loaded machine may take for what takes one: every wait ends when the process does."""


def trained() -> tuple[Any, torch.optim.Optimizer]:
    """Return a model of 2 MB with an optimizer that has stepped once."""
    parallel.ensure_initialized()
    module = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 600))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    module(torch.ones(300)).sum().backward()
    optimizer.step()
    return SimpleNamespace(module=module), optimizer


def update_of(model: Any, optimizer: torch.optim.Optimizer) -> Update:
    return Update(chunks_of(model), [optimizer])


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
        checkpoint.save(state_path(Path(root), step), lightning_state(step), update_of(model, optimizer), Layout())
        prune(Path(root), keep=2)


def loaded_step(path: Path) -> int:
    """Load a state and return its step, which every number of it must tell."""
    model, optimizer = trained()
    common, state = checkpoint.read_common(path)
    update = update_of(model, optimizer)
    checkpoint.read_weights(path, state, update)
    checkpoint.read_optimizer(path, state, update)
    values = list(model.module.parameters()) + [
        optimizer.state[p][k] for p in model.module.parameters() for k in ("exp_avg", "exp_avg_sq")
    ]
    assert {float(v.detach().flatten()[i]) for v in values for i in (0, -1)} == {float(common["global_step"])}
    return common["global_step"]


@pytest.mark.slow
@pytest.mark.processes
def test_every_visible_state_is_whole_after_random_kills(tmp_path: Path) -> None:
    context, moments, before, unfinished = get_context("forkserver"), random.Random(0), 0, 0
    context.set_forkserver_preload(["graftwork.training.state.checkpoint"])
    for _ in range(KILLS):
        process = context.Process(target=save_forever, args=(str(tmp_path),))
        process.start()
        deadline = time.monotonic() + PATIENCE
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


SCRIPT = """
import sys
from pathlib import Path
from graftwork.peft import LoRA
from tests.helpers.tiny_run import finetune
from graftwork.training.callbacks import TrainingState
from tests.helpers import tiny_run

data, root = Path(sys.argv[1]), Path(sys.argv[2])
state = TrainingState(every_n_steps=1)
trainer = tiny_run.trainer(root, max_steps=int(sys.argv[3]), limit_val_batches=0, callbacks=[state])
finetune(tiny_run.model(), trainer, tiny_run.data_module(data), [LoRA(dim=4)], tiny_run.optim(schedule="constant"))
"""


def start(data: Path, root: Path, steps: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(data), str(root), str(steps)], env=environment)


def wait_for_states(root: Path, process: subprocess.Popen, after: int = -1) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        found = latest(root)
        if found is not None and int(found.name[5:]) > after:
            return int(found.name[5:])
        time.sleep(0.02)
    raise AssertionError(f"no training state appeared (exit code {process.poll()})")


@pytest.mark.slow
@pytest.mark.processes
def test_kill_loses_only_the_steps_since_the_last_state_and_signals_exit_75(tiny_data: Path, tmp_path: Path) -> None:
    process = start(tiny_data, tmp_path, 100_000)
    wait_for_states(tmp_path, process)
    process.kill()
    process.wait()
    killed_at = int(latest(tmp_path).name[5:])  # type: ignore[union-attr]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = start(tiny_data, tmp_path, 100_000)
        before = wait_for_states(tmp_path, process, after=killed_at)
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == 75
        killed_at = int(latest(tmp_path).name[5:])  # type: ignore[union-attr]
        assert killed_at >= before
    assert len(states(tmp_path)) == 2
