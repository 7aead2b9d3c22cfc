"""Damaged training states: one sentence, or every bit as it was saved. Nothing else, and the weights unchanged."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork import parallel
from graftwork.errors import GraftworkError
from graftwork.layout import Layout
from graftwork.training.optimizer import Update
from graftwork.training.state import checkpoint
from graftwork.training.state.identity import Identity
from tests.fuzz.mutations import Mutation, damage, draw
from tests.helpers.lightning_state import lightning_state

FAMILIES = ("json", "bytes", "directory")
CORPUS = Path(__file__).parent / "corpus" / "states.json"
LIMIT = 1000
"""Longest message, in characters."""


def trained(seed: int) -> tuple[list[nn.Module], torch.optim.Optimizer]:
    """Return a model with an optimizer that has stepped once."""
    parallel.ensure_initialized()
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 3))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module(torch.randn(4, 12)).sum().backward()
    optimizer.step()
    return [module], optimizer


def values(chunks: list[nn.Module], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return every number of the state."""
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    moments = [optimizer.state[p][key] for p in parameters for key in ("step", "exp_avg", "exp_avg_sq")]
    return [t.detach().clone() for t in (*parameters, *moments)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A state, what it holds, and the state as the version before wrote it: without identity and checksums."""
    root = tmp_path_factory.mktemp("states")
    chunks, optimizer = trained(1)
    own = lightning_state(3)
    identity = Identity(decides={"optim": "AdamW", "optim.lr": 1e-2}, around={"trainer.max_steps": 3}, recipe="a = 1")
    checkpoint.save(root / "state", own, Update(chunks, [optimizer]), Layout(), identity)
    shutil.copytree(root / "state", root / "before")
    facts = json.loads((root / "before" / "state.json").read_text())
    kept = {k: v for k, v in facts.items() if k not in ("identity", "files", "checksum")}
    (root / "before" / "state.json").write_text(json.dumps(kept))
    return SimpleNamespace(root=root, values=values(chunks, optimizer), common=own, identity=identity)


def read(path: Path) -> tuple[Any, list[Tensor]]:
    """Read a state as a resuming run does; return what is common and every number."""
    chunks, optimizer = trained(2)
    update = Update(chunks, [optimizer])
    common, state = checkpoint.read_common(path)
    random_state = checkpoint.read_random_state(path, state, Layout())
    checkpoint.read_weights(path, state, update)
    checkpoint.read_optimizer(path, state, update)
    return (common, state.identity, random_state), values(chunks, optimizer)


def outcome(source: Path, mutation: Mutation, place: Path, saved: SimpleNamespace, exact: bool) -> str:
    """Damage a copy of ``source`` and read it: 'refused', 'equal', or (where ``exact`` is not asked) 'other'."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    damage(place, mutation)
    try:
        (common, identity, _), found = read(place)
    except GraftworkError as refused:
        assert 0 < len(str(refused)) < LIMIT, f"{mutation}: a message of {len(str(refused))} characters"
        return "refused"
    equal = all(torch.equal(a, b) for a, b in zip(found, saved.values, strict=True))
    equal = equal and (identity == saved.identity or not exact) and common["loops"] == saved.common["loops"]
    assert equal or not exact, f"{mutation}: read without a word, but not as it was saved"
    return "equal" if equal else "other"


def fuzz(mutations: list[Mutation], saved: SimpleNamespace, place: Path) -> Counter[str]:
    """Return how often each thing came out; an error of any other kind ends the test with the mutation's name."""
    found: Counter[str] = Counter()
    for number, mutation in enumerate(mutations):
        try:
            found[outcome(saved.root / "state", mutation, place, saved, exact=True)] += 1
            if number % 4 == 0:
                found["before: " + outcome(saved.root / "before", mutation, place, saved, exact=False)] += 1
        except Exception as error:
            raise AssertionError(f"{mutation}: {type(error).__name__}: {str(error)[:300]}") from error
    return found


def test_an_undamaged_state_is_read_bit_for_bit(saved: SimpleNamespace) -> None:
    for name in ("state", "before"):
        assert all(torch.equal(a, b) for a, b in zip(read(saved.root / name)[1], saved.values, strict=True))


def test_past_findings(saved: SimpleNamespace, tmp_path: Path) -> None:
    known = [Mutation.parse(text) for text in json.loads(CORPUS.read_text())]
    found = fuzz(known, saved, tmp_path / "copy")
    assert found["refused"] + found["equal"] == len(known)


def test_damaged_states_are_refused_or_equal(saved: SimpleNamespace, tmp_path: Path) -> None:
    found = fuzz(draw(300, FAMILIES), saved, tmp_path / "copy")
    assert found["refused"] + found["equal"] == 300 and found["refused"] > 200, found
    print(dict(found))


@pytest.mark.slow
def test_thousands_of_damaged_states_are_refused_or_equal(saved: SimpleNamespace, tmp_path: Path) -> None:
    found = fuzz(draw(5000, FAMILIES), saved, tmp_path / "copy")
    assert found["refused"] + found["equal"] == 5000, found
    print(dict(found))
