"""Start-up: help and the list of recipes import neither lightning nor megatron; a recipe does once it is asked for."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.cli import heap
from tests.helpers.snippets import ROOT

NEMORUN = str(Path(sys.executable).with_name("nemorun"))
HEAVY = ("lightning", "megatron", "transformers")

HELP = """
import sys
sys.argv = ["nemorun", "graft", "--help"]
from nemo_run.__main__ import app
try:
    app()
except SystemExit as ended:
    assert not ended.code
"""
IMPORT = "import sys\nfrom graftwork import executors, recipes\nassert 'smollm2_135m' in recipes.RECIPES\n"
SHOW = "print([name for name in {heavy} if name in sys.modules])\n"


def loaded(code: str) -> str:
    """Return the last line that ``code`` prints: the heavy packages it has imported."""
    code += SHOW.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("code", [HELP, IMPORT], ids=["help", "recipes"])
def test_a_look_around_imports_nothing_heavy(code: str) -> None:
    assert loaded(code) == "[]"


def test_a_recipe_that_is_asked_for_is_there() -> None:
    found = loaded(IMPORT + "recipes.smollm2_135m.finetune_recipe()\n")
    assert "lightning" in found and "megatron" in found


def test_the_collector_works_as_usual_once_a_command_has_started() -> None:
    before = gc.get_threshold()
    heap.started()
    assert gc.get_freeze_count() == 0, "what did not rest is left alone"
    heap.starting()
    assert gc.get_threshold()[0] == heap.WHILE_STARTING
    heap.started()
    try:
        assert gc.get_threshold() == before and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
