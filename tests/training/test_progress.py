"""Progress lines, throughput and the loss curve."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

from graftwork.peft import LoRA
from graftwork.training.callbacks.progress import Progress, clock
from graftwork.training.callbacks.throughput import Throughput, real_tokens
from graftwork.training.plot import loss_curve, smoothed, spans_widely
from tests.helpers import tiny_run


def train(data: Path, root: Path, **options: Any) -> None:
    trainer = tiny_run.trainer(root, max_steps=4, val_check_interval=4, **options)
    tiny_run.finetune(tiny_run.model(), trainer, tiny_run.data_module(data), [LoRA(dim=4)], tiny_run.optim())


def test_without_a_terminal_there_are_plain_lines(tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    train(tiny_data, tmp_path)
    reading, *out = capsys.readouterr().out.splitlines()
    assert reading.startswith("reading ") and reading.endswith(": input/output rows (input, output), 48 rows")
    assert out[0].startswith("training LoRA 'lora' (rank ") and out[0].endswith(" %)")
    assert [line.split(":")[0] for line in out[1:6]] == ["  base", "  at", "  data", "  run", "  memory"]
    assert out[6].startswith("step 1/4: loss 5.") and "tokens/s" in out[6] and out[6].endswith("left")
    assert [line.split(":")[0] for line in out[7:]] == ["step 4/4", "step 4"]
    assert out[8].startswith("step 4: val_loss 5.")


def test_the_banner_tells_base_sites_rows_steps_and_ranks(tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    train(tiny_data, tmp_path)
    base, at, data, run, memory = capsys.readouterr().out.splitlines()[2:7]
    assert base == "  base: random weights, llama of 2 layers x 32, float32"
    assert at == "  at: 2 linear_proj, 2 linear_qkv, 2 linear_fc1, 2 linear_fc2"
    rows = [json.loads(line) for line in (tiny_data / "train.jsonl").read_text().splitlines()]
    train_rows, held_out = (int(n) for n in re.findall(r"(\d+) rows", data))
    assert train_rows + held_out == len(rows) and held_out > 0 and data.endswith("8 a step, of at most 48 tokens")
    assert run == "  run: 4 steps, on 1 rank (cpu)" and re.fullmatch(
        r"  memory: \d\.\d\d GB in this process .*", memory
    )


def test_every_line_when_asked(tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    train(tiny_data, tmp_path, callbacks=[Progress(every_seconds=0)])
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step") and "/4:" in line]
    assert len(steps) == 4


def test_on_a_terminal_there_is_a_bar(tiny_data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    train(tiny_data, tmp_path)
    assert "4/4" in screen.getvalue() and "loss" in screen.getvalue() and "tokens/s" in screen.getvalue()
    assert "step 1/4" not in capsys.readouterr().out


def test_a_quiet_trainer_stays_quiet(tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    train(tiny_data, tmp_path, enable_progress_bar=False)
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3675, "1:01:15")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_padding_does_not_count_as_throughput() -> None:
    labels = torch.tensor([[-100, 5, 6, -100], [7, -100, -100, -100], [-100, -100, -100, -100]])
    assert real_tokens(labels) == 3 + 1


def test_average_leaves_the_first_step_out() -> None:
    rate = Throughput()
    rate._steps = [(100, 100.0), (30, 1.0), (10, 1.0)]
    assert rate.average == 20.0


def test_smoothing_follows_a_straight_line_without_lag() -> None:
    line = [10.0 - 0.1 * i for i in range(80)]
    assert smoothed(line) == pytest.approx(line)
    noisy = [1.0 + (-1) ** i for i in range(100)]
    assert all(0.5 < value < 1.5 for value in smoothed(noisy)[5:-5])


@pytest.mark.parametrize("points", [0, 1, 300])
def test_picture_is_a_png_for_any_number_of_points(points: int) -> None:
    train = [(i + 1, 2.0 / (i + 1)) for i in range(points)]
    picture = image.imread(io.BytesIO(loss_curve(train, train[::50], "run: LoRA")))
    assert picture.shape == (540, 960, 4)


def test_only_losses_that_span_widely_get_a_logarithmic_scale() -> None:
    assert spans_widely([8.0, 0.3]) and not spans_widely([8.0, 0.5])
    assert not spans_widely([]) and not spans_widely([1.0, 0.0])  # zero has no place on such a scale
