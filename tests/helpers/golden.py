"""Golden texts of the recipes: reviewed like code, rewritten by ``make golden`` after an intended change."""

from pathlib import Path

from graftwork.recipes import RECIPES, show

DIRECTORY = Path(__file__).parents[1] / "golden"


def golden(name: str) -> Path:
    """Return the file that holds the text of recipe ``name``."""
    return DIRECTORY / f"{name}.txt"


def text(name: str) -> str:
    """Return what the file of recipe ``name`` must say."""
    return show(RECIPES[name].finetune_recipe()) + "\n"


def rewrite() -> None:
    """Write every golden text; remove those of recipes that are gone."""
    for file in DIRECTORY.glob("*.txt"):
        file.unlink()
    for name in RECIPES:
        golden(name).write_text(text(name))
    print(f"{len(RECIPES)} texts in {DIRECTORY}; review them with git diff")


if __name__ == "__main__":
    rewrite()
