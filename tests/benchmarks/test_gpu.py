"""The comparison of two devices, on one: the CPU equals itself, and what is wrong is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.peft import METHODS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_cases
import gpu_parity
import gpu_table

BENCHMARKS = Path(gpu_cases.__file__).parent
FEW = [gpu_cases.Case("gpt", "lora+ia3+canonical_adapter+ptuning"), gpu_cases.Case("t5", "full fine-tuning")]


def test_every_method_is_compared() -> None:
    compared = {type(transform) for stack in gpu_cases.STACKS.values() for transform in stack()}
    assert compared == set(METHODS.values())
    assert {case.kind for case in gpu_cases.CASES} == {"gpt", "mixture", "t5"}


def test_a_device_equals_itself_and_another_loss_is_found(tmp_path: Path) -> None:
    gpu_parity.write_reference(tmp_path, FEW)
    rows = list(gpu_parity.compare(tmp_path, FEW))
    assert [row["ok"] for row in rows] == [True, True]
    assert all(row[what] == 0 for row in rows for what in gpu_parity.TOLERANCES)

    file = tmp_path / FEW[0].place / gpu_parity.FIGURES
    figures = load_file(file)
    assert {"logits", "loss 1", "loss 3"} < figures.keys()
    assert sum(name.startswith("gradient") for name in figures) > 10
    save_file(figures | {"loss 3": figures["loss 3"] * (1 + 5e-5)}, file)
    assert [row["ok"] for row in gpu_parity.compare(tmp_path, FEW)] == [False, True]


@pytest.mark.parametrize(
    "found",
    (
        {"logits": torch.ones(2, 3)},
        {"logits": torch.ones(2, 3), "gradient a": torch.ones(3)},
        {"logits": torch.full((2, 3), torch.nan), "gradient a": torch.ones(4)},
    ),
    ids=("missing", "shape", "nan"),
)
def test_what_cannot_be_compared_is_infinitely_far(found: dict[str, torch.Tensor]) -> None:
    wanted = {"logits": torch.ones(2, 3), "gradient a": torch.ones(4)}
    assert gpu_parity.furthest(found, wanted)["logits"] == float("inf")


def test_a_gradient_of_nearly_zero_has_the_scale_of_the_others() -> None:
    wanted = {"gradient a": torch.tensor([1.0]), "gradient b": torch.tensor([1e-9])}
    apart = gpu_parity.furthest(wanted | {"gradient b": torch.tensor([3e-9])}, wanted)["gradient"]
    assert apart == pytest.approx(2e-6, rel=1e-3)


@pytest.mark.slow
def test_the_script_needs_no_nemo_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['nemo_run'] = None\n")
    script, output = BENCHMARKS / "gpu.py", tmp_path / "gpu.json"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{BENCHMARKS.parent}"}
    done = subprocess.run(
        [sys.executable, str(script), "--toy", "--output", str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.read_text())
    assert results["ok"] and results["resumed"]["furthest"] == 0
    assert len(results["parity"]) == len(gpu_cases.CASES)
    assert all("tokens_per_second" in row for row in results["speed"])
    assert "| toy | peer | 4 x 32 | full |" in gpu_table.markdown(results)
