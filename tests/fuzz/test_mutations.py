"""The mutation engine itself: reproducible, every kind does something to most documents, corpus lines read back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.fuzz.mutations import KINDS, Mutation, damage, draw

DOCUMENT = {"a": {"b": [1, 2, {"c": "text"}]}, "d": None, "e": 1.5, "f": [{"g": True}, {"g": False}]}


def files(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(DOCUMENT))
    (directory / "model.safetensors").write_bytes(save({f"t{i}": torch.arange(6.0 + i) for i in range(4)}))
    return directory


def contents(directory: Path) -> dict[str, bytes | str]:
    def seen(path: Path) -> bytes | str:
        if path.is_symlink():
            return f"link to {path.name}"
        return path.read_bytes() if path.is_file() else "something else"

    return {path.name: seen(path) for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("kind", [kind for kinds in KINDS.values() for kind in kinds])
def test_every_kind_changes_something_and_is_reproducible(kind: str, tmp_path: Path) -> None:
    original, changed = contents(files(tmp_path / "original")), 0
    for seed in range(6):
        found = []
        for copy in ("first", "second"):
            place = files(tmp_path / f"{copy}{seed}")
            damage(place, Mutation(kind, seed))
            found.append(contents(place))
        assert found[0] == found[1]
        changed += found[0] != original
    assert changed


def test_mutations_are_lines_of_a_corpus() -> None:
    drawn = draw(200)
    assert len(set(drawn)) == 200 and {m.kind for m in drawn} == {k for kinds in KINDS.values() for k in kinds}
    assert [Mutation.parse(str(mutation)) for mutation in drawn] == drawn
