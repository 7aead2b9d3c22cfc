"""Golden texts of the recipes: reviewed like code, rewritten by ``make golden`` with what the docs derive and draw."""

from pathlib import Path

from graftwork.recipes import RECIPES, show
from tests.helpers import derived, drawings

DIRECTORY = Path(__file__).parents[1] / "golden"


def golden(name: str) -> Path:
    """Return the file that holds the text of recipe ``name``."""
    return DIRECTORY / f"{name}.txt"


def text(name: str) -> str:
    """Return what the file of recipe ``name`` must say."""
    return show(RECIPES[name].finetune_recipe()) + "\n"


def rewrite() -> None:
    """Write every golden text, picture and derived block of the pages; remove the texts of recipes that are gone."""
    for file in DIRECTORY.glob("*.txt"):
        file.unlink()
    for name in RECIPES:
        golden(name).write_text(text(name))
    for page in derived.pages():
        page.write_text(derived.text(page))
    for name, drawing in drawings.DRAWINGS.items():
        drawings.file_of(name).write_text(drawing().svg())
    print(f"{len(RECIPES)} texts in {DIRECTORY}, {len(derived.pages())} pages; review them with git diff")


if __name__ == "__main__":
    rewrite()
