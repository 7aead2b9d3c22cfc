"""Constructors that a recipe or the command line sets: types NeMo Run parses, names it does not take for itself."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any, Optional, Union, get_type_hints

import pytest

from graftwork.data import SFTDataModule
from graftwork.models import GPT, shapes
from graftwork.optim import AdamW
from graftwork.peft import METHODS, PEFT
from graftwork.peft.method import LayerChoice
from graftwork.training import MegatronStrategy, finetune

PLAIN = [int, float, bool, str, list[str], list[int], dict[str, int]]
BY_TASK = Union[dict[str, str], str]  # tried in this order: any text is a str
PATHS = Union[list[str], str, None]  # "a.jsonl" is no list, so it is a str
SETTABLE = [*PLAIN, BY_TASK, Optional[BY_TASK], PATHS, LayerChoice, *(Optional[t] for t in PLAIN)]
CLASSES = [*METHODS.values(), SFTDataModule, AdamW, MegatronStrategy, shapes.Shape, shapes.llama2_7b]
RESERVED = ("run", "executor", "plugins")


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {n: p for n, p in inspect.signature(target).parameters.items() if n != "self"}


@pytest.mark.parametrize("target", CLASSES, ids=lambda c: c.__name__)
def test_every_parameter_has_a_type_that_the_command_line_parses(target: Callable[..., Any]) -> None:
    for name, parameter in parameters(target).items():
        assert parameter.annotation in SETTABLE, f"{target.__name__}.{name}: {parameter.annotation}"


@pytest.mark.parametrize("target", [*CLASSES, GPT, finetune], ids=lambda c: c.__name__)
def test_no_parameter_has_a_name_that_nemo_run_takes(target: Callable[..., Any]) -> None:
    taken = [n for n, r in itertools.product(parameters(target), RESERVED) if n.startswith(r)]
    assert not taken and not any(isinstance(p.annotation, str) for p in parameters(target).values())


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda c: c.__name__)
def test_a_method_has_its_name_first_and_its_layers_last(method: type) -> None:
    names = list(parameters(method))
    assert names[0] == "name" and ("layers" not in names or names[-1] == "layers")
    assert all(p.default is not p.empty for p in parameters(method).values())


def test_finetune_is_the_verb_of_the_recipes() -> None:
    assert list(parameters(finetune))[:7] == ["model", "trainer", "data", "peft", "optim", "resume", "seed"]
    assert get_type_hints(finetune)["peft"] == Optional[list[PEFT]]
