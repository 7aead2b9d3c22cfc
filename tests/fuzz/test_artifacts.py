"""Mutated artifacts: refused in one sentence with the model as it was, or loaded as exactly what the files say.

The oracle reads the files with other code (safetensors, json). What was not signed again must load as the good one.
"""

import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftwork.errors import GraftworkError
from graftwork.models import GPT
from graftwork.peft import METHODS, CanonicalAdapter
from graftwork.peft.artifact import directory as artifact
from tests.contracts.methods import STACKS, make, shake
from tests.fuzz.mutations import Mutation, damage, draw

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CORPUS = Path(__file__).parent / "corpus" / "artifacts.json"
SECONDS, MEBIBYTES, LETTERS = 5.0, 300, 2000
STACK = "all"


@dataclass(frozen=True)
class Case:
    """A mutation, and whether the checksum was made to fit what it made."""

    mutation: Mutation
    signed: bool

    def __str__(self) -> str:
        return f"{self.mutation}{' signed' if self.signed else ''}"


def cases(count: int) -> list[Case]:
    return [Case(mutation, signed) for mutation in draw(count // 2) for signed in (False, True)]


def known() -> list[Case]:
    return [Case(Mutation.parse(found["mutation"]), found["signed"]) for found in json.loads(CORPUS.read_text())]


class Subject:
    """A model with an adapter of its own that every mutated artifact is loaded into."""

    def __init__(self, good: Path) -> None:
        self.model = make()
        self.model.add_adapter(CanonicalAdapter("mine", dim=4))
        shake(self.model)
        self.good = good
        self.before = self.state()

    def state(self) -> dict[str, tuple[bool, Tensor]]:
        return {n: (p.requires_grad, p.detach().clone()) for n, p in self.model.named_parameters()}

    def unchanged(self) -> bool:
        now, layout = dict(self.model.named_parameters()), self.model.prompt_layout
        return (
            list(now) == list(self.before)
            and list(self.model.adapters) == ["mine"]
            and not layout.slots
            and not self.model.stack.prompt_formats
            and all(now[n].requires_grad == f and torch.equal(now[n], value) for n, (f, value) in self.before.items())
        )

    def meet(self, case: Case, path: Path) -> str:
        """Load the mutated artifact at ``path``; return how it ended: ``refused`` or ``equal``."""
        started = time.process_time()
        try:
            self.model.load_adapters(path, trainable=False)
        except GraftworkError as error:
            text = str(error)
            assert "\n" not in text and 10 < len(text) < LETTERS, f"{case}: {text[:300]}"
            outcome = "refused"
        else:
            self.check_loaded(case, path)
            outcome = "equal"
        assert time.process_time() - started < SECONDS, f"{case} took too long"
        assert self.unchanged(), f"{case} changed the model"
        return outcome

    def check_loaded(self, case: Case, path: Path) -> None:
        """Compare what was loaded with the files, read by other code, and take it off again."""
        source = path if case.signed else self.good
        tensors, config = load_file(source / TENSORS), json.loads((source / CONFIG).read_text())
        names = [
            entry["hyperparameters"].get("name", METHODS[entry["method"]].short_name()) for entry in config["adapters"]
        ]
        assert list(self.model.adapters) == ["mine", *names], case
        for name, entry in zip(names, config["adapters"]):
            assert repr(self.model.adapters[name]) == repr(METHODS[entry["method"]](**entry["hyperparameters"])), case
            for tensor in self.model.stack.tensors(name):
                assert torch.equal(tensor.parameter, tensors[tensor.key]), f"{case}: {tensor.key}"
        for name in names:
            self.model.delete_adapter(name)


def sign(path: Path) -> None:
    """Make the checksum fit, where there is something to sign; the rest of the text stays as it was mutated."""
    if not ((path / CONFIG).is_file() and (path / TENSORS).is_file()):
        return
    try:
        text = (path / CONFIG).read_text()
        config = json.loads(text)
        text = text.replace(config["checksum"], artifact._checksum(config, path / TENSORS))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    (path / CONFIG).write_text(text)


def run(chosen: list[Case], good: Path, place: Path) -> Counter[str]:
    """Meet every case; return how often each outcome came."""
    subject, found, peak = Subject(good), Counter[str](), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, case in enumerate(chosen):
        path = shutil.copytree(good, place / str(number) / "adapter")
        damage(path, case.mutation)
        if case.signed:
            sign(path)
        found[subject.meet(case, path)] += 1
        shutil.rmtree(path.parent)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    assert grown < MEBIBYTES, f"{grown:.0f} MiB for artifacts of 100 KiB"
    return found


def saved(model: GPT, path: Path) -> Path:
    model.add_adapter(STACKS[STACK]())
    model.stack.remember_prompt_format(
        {"prompt_template": "{input} ", "answer_template": "{output}", "add_bos": None, "add_eos": True}
    )
    shake(model)
    return model.save_adapters(path, step=3, recipe="trainer: x", verify=False)  # loading reads no proof


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(make(), tmp_path_factory.mktemp("artifact") / "adapter")


def test_a_few_hundred_mutations(good: Path, tmp_path: Path) -> None:
    found = run(cases(300), good, tmp_path)
    assert sum(found.values()) == 300 and found["refused"] > 200 and found["equal"] > 5, found


def test_past_findings(good: Path, tmp_path: Path) -> None:
    found = run(known(), good, tmp_path)
    assert found.total() >= 10


@pytest.mark.slow
def test_thousands_of_mutations(good: Path, tmp_path: Path) -> None:
    found = run(cases(5000), good, tmp_path)
    print(f"artifacts: {dict(found)}")
    assert sum(found.values()) == 5000 and found["refused"] > 3000, found


def _spoiled(subject: Subject) -> None:
    next(iter(subject.model.parameters())).data[0] += 1


def _thawed(subject: Subject) -> None:
    next(iter(subject.model.parameters())).requires_grad_(True)


def _grown(subject: Subject) -> None:
    subject.model.add_adapter(CanonicalAdapter("more", dim=4))


@pytest.mark.parametrize("spoil", [_spoiled, _thawed, _grown])
def test_the_oracle_notices_a_changed_model(spoil: Callable[[Any], None], good: Path) -> None:
    subject = Subject(good)
    assert subject.unchanged()
    spoil(subject)
    assert not subject.unchanged()
