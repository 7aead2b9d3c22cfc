"""Completion: what a real shell offers for a line that is being typed."""

import shutil
import subprocess
from pathlib import Path

import fiddle as fdl
import pytest

from graftwork.cli.completion import completion, paths, script
from graftwork.errors import ConfigError
from graftwork.recipes import RECIPES

ASK = """
source {file}
COMP_LINE={line!r} COMP_POINT={point} COMP_WORDS=({line}) COMP_CWORD=1
_graftwork
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of both shells."""
    directory = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        directory.joinpath(shell).write_text(script(shell))
    return directory


def offered(scripts: Path, line: str) -> list[str]:
    """Return what bash offers at the end of ``line``."""
    asked = ASK.format(file=scripts / "bash", line=line, point=len(line))
    done = subprocess.run(["bash", "--norc", "-c", asked], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [word for word in done.stdout.split("\n") if word]


def test_verbs_recipes_options_and_executors_complete(scripts: Path) -> None:
    assert "graft" in offered(scripts, "nemorun gr")
    assert offered(scripts, "nemorun graft fin") == ["finetune"]
    assert {"finetune", "generate", "evaluate"} <= set(offered(scripts, "nemorun graft "))
    assert offered(scripts, "nemorun graft finetune --factory ") == [*RECIPES, "auto"]
    assert offered(scripts, "nemorun graft finetune --factory smol") == ["smollm2_135m"]
    assert offered(scripts, "nemorun graft finetune --factory=smol") == ["smollm2_135m"]  # bash keeps --factory=
    assert offered(scripts, "nemorun graft finetune --dry") == ["--dryrun"]
    assert set(offered(scripts, "nemorun graft finetune run.executor=")) >= {"local", "slurm", "docker"}


def test_fields_complete_down_to_the_last(scripts: Path) -> None:
    assert offered(scripts, "nemorun graft finetune --factory smollm2_135m trainer.max_st") == ["trainer.max_steps="]
    assert "peft[0].dim=" in offered(scripts, "nemorun graft finetune peft[0].d")
    assert "lora" in offered(scripts, "nemorun graft finetune peft=l")
    assert offered(scripts, "nemorun graft generate max_new") == ["max_new_tokens="]
    assert offered(scripts, "nemorun graft generate trainer.") == []
    assert offered(scripts, "nemorun graft finetune nothing.of.this.kind") == []


def test_what_is_offered_can_be_set() -> None:
    recipe = RECIPES["smollm2_135m"].finetune_recipe()
    for path in paths(recipe):
        *parents, name = path.replace("[", ".").replace("]", "").split(".")
        owner: object = recipe
        for part in parents:
            owner = owner[int(part)] if isinstance(owner, list) else getattr(owner, part)
        assert isinstance(owner, fdl.Buildable)
        setattr(owner, name, None)


ZSH = """
source {file}
compadd() {{ print -l -- "${{(@)@:#-*}}" }}
words=({line}) CURRENT={current}
_graftwork
"""


def test_zsh_offers_the_same(scripts: Path) -> None:
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("there is no zsh here: its script is only written")
    lines = {
        "nemorun graft fin": ["finetune"],
        "nemorun graft finetune --factory smol": ["smollm2_135m"],
        "nemorun graft finetune trainer.max_st": ["trainer.max_steps="],
        "nemorun graft finetune 'peft[0].dim'": ["peft[0].dim="],
    }
    for line, expected in lines.items():
        asked = ZSH.format(file=scripts / "zsh", line=line, current=len(line.split()))
        done = subprocess.run([zsh, "-f", "-c", asked], capture_output=True, text=True)
        assert done.stdout.split() == expected and not done.stderr, (line, done)


def test_another_shell_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no completion for 'fish'"):
        completion("fish")
