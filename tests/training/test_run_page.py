"""report.html: it shows what the run's files and the model say, holds no foreign text as HTML, and comes last."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftwork.data.tokenizer import checkpoint_tokenizer
from graftwork.errors import CheckpointError
from graftwork.inference import Examples, evaluate_model
from graftwork.peft import LoRA, PTuning
from graftwork.peft.artifact.card import Way
from graftwork.peft.movement import Movement, movements
from graftwork.training.callbacks import BeforeAfter, Interrupted, Report, Samples
from graftwork.training.callbacks import report as report_module
from graftwork.training.page.curves import Line, curves, short, thinned, ticks
from graftwork.training.page.heat_map import heat_maps
from graftwork.training.page.run_page import Story, duration, run_page
from tests.helpers import tiny_run
from tests.helpers.page import Page
from tests.helpers.tiny_run import finetune

EVIL = '<script>"&amp;'


def trained(root: Path, directory: Path, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Train six steps of two adapters on rows that would like to be HTML."""
    callbacks = [BeforeAfter(lambda _, model: evaluate_model(model, examples(root))), *options.pop("callbacks", [])]
    trainer = tiny_run.trainer(directory, max_steps=6, val_check_interval=3, callbacks=callbacks)
    model = tiny_run.model()
    model.tokenizer = checkpoint_tokenizer(root / "tokenizer")
    stack = [LoRA(dim=4), PTuning(virtual_tokens=2, embedding_dim=8, bottleneck_dim=8)]
    data = tiny_run.data_module(root, seq_length=60)
    text = f"recipe = 'x'\ndata.train = {EVIL!r}"
    told = {"recipe_text": text, "recipe_changes": f"- data.train = None\n+ data.train = {EVIL!r}", "samples": 2}
    summary = finetune(model, trainer, data, stack, tiny_run.optim(), **told, **options)
    return model, trainer, dict(summary)


def examples(root: Path) -> Examples:
    return Examples.from_file(str(root / "train.jsonl"), limit=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_run.write_data(tmp_path_factory.mktemp("hostile"))
    rows = [{"input": f"{EVIL} {i}", "output": "</td>yes" if i % 2 else "no"} for i in range(24)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("runs") / "page <b>"
    model, trainer, summary = trained(data, directory)
    html = (directory / "report.html").read_text()
    report = next(c for c in trainer.callbacks if isinstance(c, Report))
    return {"page": Page(html), "html": html, "model": model, "trainer": trainer, "summary": summary, "report": report}


def test_figures_are_those_of_the_summary(run: dict[str, Any]) -> None:
    text, summary = run["page"].text, run["summary"]
    assert not run["page"].open
    for value in (f"{summary['val_loss']:.4f}", f"{summary['trainable_parameters']:,} of", "6 steps", "page <b>"):
        assert value in text
    assert set(summary["metrics"]) == {"loss", "exact_match", "accuracy"}
    for name, values in summary["metrics"].items():
        (row,) = [row for row in run["page"].rows if row[0] == name]
        assert row[1:3] == [f"{values['before']:.4g}", f"{values['after']:.4g}"]


def test_what_was_set_beside_the_recipe_is_told(run: dict[str, Any]) -> None:
    text = run["page"].text
    assert "What was set" in text and f"- data.train = None\n+ data.train = {EVIL!r}" in text


def test_curves_have_a_point_for_every_step(run: dict[str, Any]) -> None:
    titles = ["loss", "learning rate", "gradient norm", "tokens per second", "peak memory"]
    assert run["page"].figures == titles
    assert run["page"].lines == [6, 2, *[6] * 7], "training, validation, two rates, three norms, two others"
    series = run["report"].series
    by_adapter = {f"{what}/{name}" for what in ("lr", "grad_norm") for name in ("lora", "ptuning")}
    assert by_adapter | {"grad_norm", "tokens_per_second", "memory_gb"} == set(series)
    assert all([step for step, _ in points] == list(range(1, 7)) for points in series.values())


def test_logged_values_are_those_of_the_log(run: dict[str, Any]) -> None:
    logged = Path(run["trainer"].default_root_dir) / "logs" / "version_0" / "metrics.csv"
    head, *lines = logged.read_text().splitlines()
    rows = [dict(zip(head.split(","), line.split(","))) for line in lines]
    for name in ("grad_norm", "lr/lora"):
        wanted = [float(row[name]) for row in rows if row[name]]
        assert [value for _, value in run["report"].series[name]] == pytest.approx(wanted, rel=1e-5)


def test_the_map_shows_what_has_moved(run: dict[str, Any]) -> None:
    """Cells tell the root mean square of every site, which its adapter's own merge agrees with."""
    found = dict(title.rsplit(": ", 1) for title in run["page"].titles)
    moved = [one for one in movements(run["model"].stack) if one.adapter == "lora"]
    assert len(found) == len(moved) == 8
    for one in moved:
        leaf, layer = one.site.rpartition(".")[2], re.search(r"layers\.(\d)", one.site)
        assert layer is not None and found[f"{leaf}, layer {layer[1]}"] == f"{one.rms:.4g}"
    (outside,) = [row for row in run["page"].rows if row[0].startswith("embedding")]
    assert float(outside[1]) > 0


def test_answers_and_confusions_stand_side_by_side(run: dict[str, Any]) -> None:
    shown = next(c for c in run["trainer"].callbacks if isinstance(c, Samples)).shown
    rows = {row[0]: row for row in run["page"].rows if row[0].startswith(EVIL)}
    first, last = ([one for one in shown if one.step == step] for step in (0, 6))
    assert len(rows) == 2
    for old, new in zip(first, last):
        row = rows[old.input]
        assert row[1].startswith(old.output) and row[2].startswith(new.output) and row[3] == old.expected
    wanted = evaluate_model(run["model"].eval(), examples(Path(run["trainer"].datamodule.files["train"]).parent))
    (*_, counts) = [row for row in run["page"].rows if row[0] == "</td>yes"]
    assert counts[1:] == [str(wanted["confusion"]["</td>yes"][label]) for label in ("</td>yes", "no")]


def test_nothing_foreign_is_html(run: dict[str, Any]) -> None:
    assert "<script" not in run["html"] and "</td>yes" not in run["html"] and "page <b>" not in run["html"]
    assert "data.train = " in run["page"].text and EVIL in run["page"].text
    assert not re.search(r"https?://|url\(|@import", run["html"]), "nothing is fetched"


def test_every_text_of_a_story_is_escaped(run: dict[str, Any]) -> None:
    moved = [Movement(f"{EVIL}.layers.0.{EVIL}", EVIL, 1.0, 4, True), Movement(EVIL, EVIL, 1.0, 4, False)]
    story = Story(
        EVIL, EVIL, [EVIL], EVIL, EVIL, {**run["summary"], "metrics": {EVIL: {"before": 1.0}}, "adapter_path": EVIL},
        5.0, [(1, 2.0)], [(1, 2.0)], {f"lr/{EVIL}": [(1, 1.0)]}, [(0, EVIL, EVIL, EVIL), (1, EVIL, EVIL, "")],
        {EVIL: {EVIL: {EVIL: 1}}}, moved, [Way(EVIL, [("sh", EVIL)]), Way(EVIL, why_not=EVIL)], EVIL, EVIL,
    )  # fmt: skip
    page = Page(run_page(story))
    assert not page.open and page.text.count(EVIL) > 20
    as_it_is, unknown = (run_page(replace(story, recipe_changes=changes)) for changes in ("", None))
    assert "The recipe as it is" in as_it_is and "What was set" not in unknown


def test_a_resumed_run_tells_the_whole_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trained(data, tmp_path, callbacks=[tiny_run.StopAfter(4)])
    assert not (tmp_path / "report.html").exists(), "a run that is not over has no report"
    _, trainer, _ = trained(data, tmp_path)
    report = next(c for c in trainer.callbacks if isinstance(c, Report))
    assert Page((tmp_path / "report.html").read_text()).lines == [6, 2, *[6] * 7]
    assert all([step for step, _ in points] == list(range(1, 7)) for points in report.series.values())
    confused = next(c for c in trainer.callbacks if isinstance(c, BeforeAfter)).confusion
    assert list(confused) == ["before", "after"]


def test_a_report_that_cannot_be_written_costs_no_result(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = report_module.atomic_write_text

    def full(path: Path, text: str) -> None:
        if path.name == "report.html":
            raise CheckpointError("the disk is full.")
        written(path, text)

    monkeypatch.setattr(report_module, "atomic_write_text", full)
    trainer = tiny_run.trainer(tmp_path, max_steps=1, limit_val_batches=0)
    with pytest.raises(CheckpointError, match="^the disk is full.$"):
        finetune(tiny_run.model(), trainer, tiny_run.data_module(data), [LoRA(dim=2)], tiny_run.optim())
    assert {"adapter", "summary.json", "loss.png", "checkpoints"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "report.html").exists()


def test_a_long_run_keeps_its_extremes_and_grows_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [(step, math.sin(step) + (5.0 if step == 1234 else 0.0)) for step in range(1, 4001)]
    kept = thinned(points)
    assert len(kept) <= 602 and kept[0] == points[0] and kept[-1] == points[-1] and points[1233] in kept
    assert thinned(points[:50]) == points[:50]
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})


def test_curves_of_nothing_or_one_point_are_drawn() -> None:
    assert curves("x", []) == curves("x", [Line("x", [(1, math.nan)])]) == ""
    for value in (0.0, 3.0, -2.0, 1e-9):
        assert Page(curves("x", [Line("x", [(5, value)])], zero=value > 0)).figures == ["x"]
    wide = curves("x", [Line("x", [(1, 1e4), (2, 1.0)])])
    assert ">1<" in wide and ">1000<" in wide, "values far apart stand on a logarithmic scale"


@pytest.mark.parametrize(
    ("low", "high", "log", "wanted"),
    [
        (0.0, 1.0, False, [0.0, 0.5, 1.0]),
        (0.93, 5.1, False, [2.0, 4.0]),
        (0.0, 4e-4, False, [0.0, 1e-4, 2e-4, 3e-4, 4e-4]),
        (0.4, 30.0, True, [0.5, 1.0, 2.0, 5.0, 10.0, 20.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, wanted: list[float]) -> None:
    assert ticks(low, high, log) == pytest.approx(wanted)


def test_figures_of_an_axis_are_short() -> None:
    assert [short(v) for v in (0.0, 0.5, 1500.0, 20000.0, 2.5e6, 3e9, 2e-5)] == [
        "0", "0.5", "1500", "20k", "2.5M", "3G", "2e-05",
    ]  # fmt: skip


def test_durations_are_told_in_two_units() -> None:
    assert [duration(s) for s in (7.31, 65, 7500, 97200)] == ["7.3 s", "1 min 5 s", "2 h 5 min", "1 d 3 h"]


def test_experts_of_a_layer_count_as_one() -> None:
    """The root mean square over all experts, and a site in some layers only leaves the others empty."""
    name = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1"
    moved = [Movement(name.format(1, 0), "lora", 3.0, 4, True), Movement(name.format(1, 1), "lora", 4.0, 12, True)]
    page = Page(heat_maps(moved))
    assert page.titles == ["linear_fc1, layer 1: 1.25"]
    assert page.rows == [["layer", "0", "1"], ["linear_fc1", "", "100"]]


def test_each_part_of_a_model_has_a_map() -> None:
    moved = [Movement(f"{part}.layers.0.mlp.linear_fc2", "lora", 1.0, 1, True) for part in ("encoder", "decoder")]
    assert [row[0] for row in Page(heat_maps(moved)).rows] == [
        "encoder, layer", "linear_fc2", "decoder, layer", "linear_fc2",
    ]  # fmt: skip


def test_every_curve_drops_the_same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "MAX_POINTS", 4)
    report = Report()
    for step in range(1, 12):
        metrics = {"train_loss": 1.0 / step, "grad_norm": math.inf if step == 8 else float(step), "other": 1.0}
        trainer: Any = SimpleNamespace(global_step=step, callback_metrics=metrics)
        report.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert [step for step, _ in report.train] == [4, 8]
    assert set(report.series) == {"grad_norm", "memory_gb"} and report.series["grad_norm"] == [(4, 4.0)]
    assert [step for step, _ in report.series["memory_gb"]] == [4, 8]
