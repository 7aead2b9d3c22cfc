"""Resume over ranks: bit for bit at the same layout, within rounding at another; a kill loses nothing saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.compat.collective import all_gather_objects
from graftwork.peft import LoRA, PTuning
from graftwork.peft.match import global_name
from graftwork.training import finetune
from graftwork.training.callbacks import Interrupted, Report
from graftwork.training.run_directory import latest, states
from graftwork.training.shards import chunks_of
from tests.helpers import tiny_run
from tests.helpers.distributed import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}
STACKS = {"adapters": lambda: [LoRA(dim=4), PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8)], "full": list}
ELSEWHERE = {"tp2_sp": "pp2", "pp2": "dp2", "dp2": "tp2_sp"}


def train(rank: int, data: Path, root: Path, layout: dict, stack: str, stop: int | None = None) -> dict[str, Any]:
    """Train six steps (or up to a request on one rank only); return the losses and this rank's weights."""
    os.environ["LOCAL_RANK"] = str(rank)
    asked = [tiny_run.StopAfter(stop)] if stop and rank == 1 else []
    world_size = torch.distributed.get_world_size()
    trainer = tiny_run.trainer(
        root, world_size, layout, max_steps=6, limit_val_batches=0, callbacks=asked, enable_progress_bar=False
    )
    model = tiny_run.GPT(tiny_run.SHAPE, checkpoint=str(data / "base"))
    try:
        finetune(model, trainer, tiny_run.data_module(data), STACKS[stack](), tiny_run.optim(eps=1e-4))
    except Interrupted as stopped:
        assert stop is not None and stopped.code == 75
    report = next(c for c in trainer.callbacks if isinstance(c, Report))
    weights = {
        global_name(chunk, n): p.detach().clone()
        for chunk in chunks_of(model)
        for n, p in chunk.named_parameters()
        if p.requires_grad
    }
    return {"losses": [loss for _, loss in report.train], "weights": weights}


def two_ranks(rank: int, world_size: int, data: Path, root: Path) -> dict[str, Any]:
    """For each stack and layout: whole, cut and resumed here, cut and resumed elsewhere."""
    found = {}
    for stack in STACKS:
        for name, layout in LAYOUTS.items():
            at = root / stack / name
            whole = train(rank, data, at / "whole", layout, stack)
            train(rank, data, at / "cut", layout, stack, stop=4)
            _copy(rank, at / "cut", at / "moved")
            same = train(rank, data, at / "cut", layout, stack)
            other = train(rank, data, at / "moved", LAYOUTS[ELSEWHERE[name]], stack)
            found[stack, name] = {"whole": whole, "same": same, "other": other}
    return found


def _copy(rank: int, source: Path, target: Path) -> None:
    if rank == 0:
        subprocess.run(["cp", "-r", source, target], check=True)
    all_gather_objects(None)


@pytest.fixture(scope="module")
def ranks(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    base = tiny_run.model()
    base.configure_model()
    base.export_hf(tiny_data / "base")
    return run_ranks(two_ranks, 2, tiny_data, tmp_path_factory.mktemp("layouts"), timeout=400)


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stack", STACKS)
def test_same_layout_resumes_bit_for_bit(stack: str, layout: str, ranks: list[dict]) -> None:
    for rank in ranks:
        found = rank[stack, layout]
        assert found["same"]["losses"] == found["whole"]["losses"]
        assert len(found["whole"]["losses"]) == 6
        for name, weight in found["whole"]["weights"].items():
            assert torch.equal(weight, found["same"]["weights"][name]), name


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stack", STACKS)
def test_another_layout_resumes_within_rounding(stack: str, layout: str, ranks: list[dict]) -> None:
    for rank in ranks:
        found = rank[stack, layout]
        assert found["other"]["losses"] == pytest.approx(found["whole"]["losses"], rel=1e-6)


SCRIPT = """
import sys
from pathlib import Path
from graftwork.peft import LoRA
from graftwork.training import finetune
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
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        found = latest(root)
        if found is not None and int(found.name[5:]) > after:
            return int(found.name[5:])
        time.sleep(0.02)
    raise AssertionError(f"no training state appeared (exit code {process.poll()})")


@pytest.mark.slow
@pytest.mark.processes
def test_kill_loses_only_the_steps_since_the_last_state_and_sigterm_exits_75(tiny_data: Path, tmp_path: Path) -> None:
    process = start(tiny_data, tmp_path, 100_000)
    wait_for_states(tmp_path, process)
    process.kill()
    process.wait()
    killed_at = int(latest(tmp_path).name[5:])  # type: ignore[union-attr]
    process = start(tiny_data, tmp_path, 100_000)
    assert wait_for_states(tmp_path, process, after=killed_at) > killed_at
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert len(states(tmp_path)) == 2
