"""Mutated proofs: refused in one sentence, or repeated as what they say; never a crash, and never ok by accident."""

import json
from collections import Counter
from pathlib import Path

import pytest

from graftwork.errors import GraftworkError
from graftwork.models import GPT
from graftwork.peft.artifact import proof
from tests.contracts.methods import STACKS, make, shake
from tests.fuzz.mutations import damage, draw


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GPT:
    model = make(sizes={"num_layers": 1})
    model.add_adapter(STACKS["lora+ia3"]())
    shake(model)
    return model


def sealed_again(file: Path) -> None:
    """Make the checksum fit whatever the mutation left."""
    try:
        content = json.loads(file.read_text())
        content["checksum"] = proof._checksum({k: v for k, v in content.items() if k != "checksum"})
        file.write_text(json.dumps(content))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return


def outcome(model: GPT, path: Path) -> str:
    try:
        found = model.verify_adapters(path)
    except GraftworkError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return "refused"
    return "ok" if all(one.ok for one in found) else "differs"


def test_mutations(model: GPT, tmp_path: Path) -> None:
    file = model.save_adapters(tmp_path / "adapter") / "proof.json"
    good, found = file.read_text(), Counter[str]()
    apart = tmp_path / "apart"
    apart.mkdir()
    for mutation in draw(240, ("json", "bytes")):
        for seal in (False, True):
            (apart / "proof.json").write_text(good)
            damage(apart, mutation)
            if seal:
                sealed_again(apart / "proof.json")
            file.write_bytes((apart / "proof.json").read_bytes())
            came = outcome(model, tmp_path / "adapter")
            found[came] += 1
            if not seal and came != "refused":
                assert came == "ok" and json.loads(file.read_text()) == json.loads(good), mutation
    assert found.total() == 480 and found["refused"] > 240 and found["differs"] and found["ok"], found
    file.write_text(good)
    assert outcome(model, tmp_path / "adapter") == "ok"
