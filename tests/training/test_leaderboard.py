"""Runs beside each other: the figures are those of their directories, the order is the asked one."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from graftwork.errors import CheckpointError, ConfigError
from graftwork.peft import LoRA
from graftwork.training.leaderboard import compare, differing, leaderboard, ranked, read_runs
from tests.helpers import tiny_run
from tests.helpers.page import Page
from tests.helpers.tiny_run import finetune

STEPS = 4


def recipe_text(**fields: object) -> str:
    lines = {"recipe": "graftwork.training.finetune.finetune", "optim.lr": 0.001, "seed": 1234, **fields}
    return "\n".join(f"{path} = {value}" for path, value in lines.items())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs and one that was stopped after a step, below ``runs``."""
    root = tiny_run.write_data(tmp_path_factory.mktemp("real"))
    for name, dim, stop in (("small", 2, None), ("large", 8, None), ("stopped", 4, 3)):
        callbacks: list[Any] = [tiny_run.StopAfter(stop)] if stop else []
        directory = root / "runs" / name
        trainer = tiny_run.trainer(directory, max_steps=STEPS, val_check_interval=2, callbacks=callbacks)
        text = recipe_text(**{"peft[0].dim": dim, "trainer.default_root_dir": repr(str(directory))})
        task = (tiny_run.model(), trainer, tiny_run.data_module(root))
        try:
            finetune(*task, peft=[LoRA(dim=dim)], optim=tiny_run.optim(), recipe_text=text)
            assert stop is None
        except SystemExit:
            assert stop is not None
    return root / "runs"


def logged(directory: Path, column: str) -> list[tuple[int, float]]:
    rows = csv.DictReader(io.StringIO((directory / "logs" / "version_0" / "metrics.csv").read_text()))
    return [(int(row["step"]) + 1, float(row[column])) for row in rows if row[column]]


def test_figures_are_those_of_the_directories(real: Path) -> None:
    runs = {run.name: run for run in read_runs([str(real)])}
    assert list(runs) == ["large", "small", "stopped"]
    for name in ("small", "large"):
        run, told = runs[name], json.loads((real / name / "summary.json").read_text())
        assert run.finished and run.steps == STEPS and run.val_loss == told["val_loss"]
        assert run.tokens_per_second == told["tokens_per_second"] and run.train_loss == told["train_loss"]
        assert run.trainable_parameters == told["trainable_parameters"]
        assert run.recipe["peft[0].dim"] == {"small": "2", "large": "8"}[name]
        assert run.curve.train == logged(real / name, "train_loss") and len(run.curve.train) == STEPS
        assert [step for step, _ in run.curve.validation] == [2, 4]
        assert run.curve.validation == logged(real / name, "val_loss")
    stopped = runs["stopped"]
    assert not stopped.finished and stopped.steps == 3 and stopped.state == "unfinished, state at step 3"
    assert stopped.val_loss == stopped.curve.validation[0][1] and stopped.recipe["peft[0].dim"] == "4"


def test_the_table_says_what_differs(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([str(real)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "val", "loss", "train", "loss", "trainable", "tokens/s", "steps", "peft[0].dim"]
    rows = [line.split() for line in lines[2:]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    best = min(read_runs([str(real)]), key=lambda run: run.val_loss or 9)
    assert rows[0][1] == best.name and rows[0][2] == f"{best.val_loss:.4f}"
    stopped = next(row for row in rows if row[1] == "stopped")
    assert " ".join(stopped[-5:]) == "unfinished, state at step 3" and stopped[4:6] == ["-", "-"]


def test_the_page_holds_table_and_curves(real: Path, tmp_path: Path) -> None:
    compare([str(real)], output=str(tmp_path / "runs.html"))
    page = Page()
    page.feed((tmp_path / "runs.html").read_text())
    assert not page.open and len(page.rows) == 4 and "peft[0].dim" in page.rows[0]
    assert {row[1] for row in page.rows[1:]} == {"small", "large", "stopped"}
    assert page.figures == ["training loss", "validation loss"]
    points = [len(curve) for run in ranked(read_runs([str(real)])) for curve in (run.curve.train, run.curve.validation)]
    assert page.lines == [*points[::2], *points[1::2]] and min(points) > 0
    compare([str(real)], output=str(tmp_path / "runs.png"))
    picture = image.imread(tmp_path / "runs.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 900
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.html", "runs.png"]


def written(root: Path, name: str, recipe: str | None = None, **summary: Any) -> str:
    (root / name / "adapter").mkdir(parents=True)
    whole = {"steps": 5, "val_loss": 1.0, "train_loss": 1.0, "tokens_per_second": 9.0, "trainable_parameters": 7}
    (root / name / "summary.json").write_text(json.dumps({**whole, "metrics": {}, **summary}))
    if recipe is not None:
        (root / name / "adapter" / "adapter_config.json").write_text(json.dumps({"recipe": recipe}))
    return str(root / name)


def test_order(tmp_path: Path) -> None:
    accuracy = {"accuracy": {"before": 0.5, "after": 0.9}}
    written(tmp_path, "a", val_loss=2.0, tokens_per_second=30.0, metrics=accuracy)
    written(tmp_path, "b", val_loss=None, tokens_per_second=20.0)
    written(tmp_path, "c", val_loss=1.0, metrics={"accuracy": {"before": 0.5, "after": 0.7}})
    runs = read_runs([str(tmp_path)])

    def order(by: str) -> list[str]:
        return [run.name for run in ranked(runs, by)]

    assert order("val_loss") == ["c", "a", "b"], "the least loss first, those without one last"
    assert order("tokens_per_second") == ["a", "b", "c"] and order("accuracy") == ["a", "c", "b"]
    with pytest.raises(ConfigError, match=r"sort='acuracy' is no figure of these runs; did you mean 'accuracy'\?"):
        ranked(runs, "acuracy")
    assert "0.9" in leaderboard(ranked(runs, "accuracy")).splitlines()[2]


def test_many_differences_stand_below_the_table(tmp_path: Path) -> None:
    fields = {f"data.field{i}": 0 for i in range(9)}
    written(tmp_path, "a", recipe_text(**fields, same=1), val_loss=0.5)
    written(tmp_path, "b", recipe_text(**dict.fromkeys(fields, 1), same=1))
    written(tmp_path, "c", recipe_text(**fields, same=1, extra=2))
    runs = ranked(read_runs([str(tmp_path)]))
    assert differing(runs) == [*fields, "extra"]
    text = leaderboard(runs)
    assert "\n6 more fields differ; against a:\n" in text and "    data.field8: 0 -> 1\n" in text
    assert "    extra: absent -> 2" in text and "same" not in text


def test_names_tell_directories_apart(tmp_path: Path) -> None:
    one, other = written(tmp_path / "x", "default"), written(tmp_path / "y", "default")
    assert [run.name for run in read_runs([one, other, one])] == ["x/default", "y/default"]


def test_a_started_again_run_has_one_curve(tmp_path: Path) -> None:
    directory = written(tmp_path, "a")
    for version, rows in ((0, "0,3.0\n1,2.5\n"), (1, "1,2.4\n2,nan\n3,2.0\n"), (10, "4,1.0\n")):
        (Path(directory) / "logs" / f"version_{version}").mkdir(parents=True)
        (Path(directory) / "logs" / f"version_{version}" / "metrics.csv").write_text(f"step,train_loss\n{rows}")
    assert read_runs([directory])[0].curve.train == [(1, 3.0), (2, 2.4), (4, 2.0), (5, 1.0)]


def test_a_recipe_cannot_write_html(tmp_path: Path) -> None:
    written(tmp_path, "<b>a", recipe_text(evil="<script>alert(1)</script>"))
    written(tmp_path, "b", recipe_text(evil="'x'"))
    compare([str(tmp_path)], output=str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<b>" not in text
    assert re.search(r"&lt;script&gt;alert\(1\)&lt;/script&gt;", text)


REFUSED = {
    "nothing": ([], {}, "no directory is named"),
    "not there": (["rnus"], {}, "there is no directory 'rnus'; did you mean 'runs'"),
    "no run": (["empty"], {}, "'empty' is no run and holds none"),
    "output": (["runs"], {"output": "x.pdf"}, "output='x.pdf' ends in neither of .html and .png"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_one_sentence(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories, options, said = REFUSED[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    written(tmp_path / "runs", "a")
    with pytest.raises(ConfigError) as raised:
        compare(directories, **options)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_damaged_summary_is_told(tmp_path: Path) -> None:
    directory = Path(written(tmp_path, "a"))
    (directory / "summary.json").write_text('{"steps": "many"}')
    with pytest.raises(CheckpointError, match=r"summary.json' does not fit: 'steps'"):
        read_runs([str(directory)])
