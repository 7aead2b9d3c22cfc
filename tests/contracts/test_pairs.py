"""Every ordered pair of methods, and one of each, in every kind of model: identity, gradients, saved, loaded,
switched off, deleted.

One model of each kind serves all pairs: what a pair leaves behind, the next one finds.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftwork.errors import MatchError
from graftwork.models.base import Model
from graftwork.parallel.record import record_of
from graftwork.peft import METHODS, PEFT
from tests.contracts.methods import everything, make, same, shake, tiny
from tests.helpers import tiny_t5

KINDS: dict[str, Callable[[], Model]] = {
    "gpt": lambda: make(sizes={"num_layers": 1}),
    "t5": lambda: tiny_t5.tiny(fields={"num_layers": 1, "num_decoder_layers": 1}),
}
PAIRS = [*itertools.product(METHODS, METHODS)]
REFUSED: dict[tuple[str, str], str] = {
    ("Selective", "Selective"): "'outer' cannot train .*norm.*: adapter 'inner' does; leave it out of one of them",
}
"""Pairs that make no sense, and why."""


@pytest.fixture(scope="module", params=KINDS)
def bases(request: pytest.FixtureRequest) -> tuple[Model, Model, Tensor]:
    """Two models with the same weights, and what they answer without adapters."""
    models = KINDS[request.param](), KINDS[request.param]()
    with torch.no_grad():
        return *models, logits(models[0])


def logits(model: Model, prompted: bool = True) -> Tensor:
    """Return the logits of the answers to two prompts, which the attached virtual tokens precede."""
    prompt = [i for slot in model.prompt_layout.slots for i in slot.ids] if prompted else []
    prompts, answers = [[*prompt, 5, 7, 11], [*prompt, 13, 2, 3]], [[17, 19, 4, 1], [23, 29, 31, 2]]
    batch = model.lay_out(prompts, answers, torch.device("cpu"))
    return model.run_chunk(model.chunks[0], batch)[:, -4:]


def adapters(inner: str, outer: str) -> list[PEFT]:
    """Return both, under the names of their places."""
    found = []
    for name, method in (("inner", inner), ("outer", outer)):
        options = tiny(METHODS[method]).hyperparameters()
        found.append(METHODS[method](**{**options, "name": name}))
    return found


@pytest.mark.parametrize(("inner", "outer"), PAIRS, ids=map("-".join, PAIRS))
def test_a_pair(inner: str, outer: str, bases: tuple[Model, Model, Tensor], tmp_path: Path) -> None:
    model, twin, base = bases
    with nothing_left(model, twin, base):
        if (inner, outer) in REFUSED:
            with pytest.raises(MatchError, match=REFUSED[inner, outer]) as caught:
                model.add_adapter(adapters(inner, outer))
            assert "\n" not in str(caught.value)
        else:
            model.add_adapter(adapters(inner, outer))
            check_birth_and_gradients(model, base)
            check_saved_and_loaded(model, twin, base, tmp_path / "pair")
            check_deleted_one_after_the_other(model, twin)


def test_one_of_every_method(bases: tuple[Model, Model, Tensor], tmp_path: Path) -> None:
    model, twin, base = bases
    with nothing_left(model, twin, base):
        model.add_adapter(everything())
        assert len(model.adapters) == len(METHODS)
        check_birth_and_gradients(model, base)
        check_saved_and_loaded(model, twin, base, tmp_path / "everything")
        check_deleted_one_after_the_other(model, twin)


@contextmanager
def nothing_left(model: Model, twin: Model, base: Tensor) -> Iterator[None]:
    """Delete whatever the block has attached; then both answer as before it, bit for bit."""
    try:
        yield
    finally:
        for each in (model, twin):
            each.zero_grad()
            for name in list(each.adapters):
                each.delete_adapter(name)
    with torch.no_grad():
        assert torch.equal(logits(model), base) and torch.equal(logits(twin), base)


def check_birth_and_gradients(model: Model, base: Tensor) -> None:
    """Fresh adapters change nothing; all, and only they, have gradients; at one module the first is inside."""
    with torch.no_grad():
        assert (logits(model, prompted=False) - base).abs().max() <= 1e-6 * base.abs().max()
    shake(model, 0.1)
    logits(model).logsumexp(-1).square().mean().backward()
    alive = dict.fromkeys(model.adapters, 0)
    for name, parameter in model.named_parameters():
        owner = record_of(parameter).owner
        assert (parameter.grad is not None) == (owner is not None), name
        if owner is not None:
            assert torch.isfinite(parameter.grad).all(), name
            alive[owner] += int(bool(parameter.grad.any()))
    assert all(alive.values())
    sites = {n: {g.site.name: g.site for g in model.stack.grafted[n]} for n in alive}
    for site in {name: site for found in sites.values() for name, site in found.items()}.values():
        wrapper = model.chunks[0].get_submodule(site.path)
        assert list(wrapper.adapters) == [n for n in alive if site.name in sites[n]]


def check_saved_and_loaded(model: Model, twin: Model, base: Tensor, path: Path) -> None:
    """Another model answers alike after loading, and as the base while it is switched off."""
    model.save_adapters(path)
    twin.load_adapters(path)
    with torch.no_grad():
        wanted = logits(model)
        assert torch.equal(logits(twin), wanted) and not torch.equal(wanted, base)
        with twin.adapters_disabled():
            assert torch.equal(logits(twin), base)
        assert torch.equal(logits(twin), wanted)


def check_deleted_one_after_the_other(model: Model, twin: Model) -> None:
    """Whichever goes first, those that stay keep every bit and act."""
    for each, first in ((model, 0), (twin, -1)):
        while len(each.adapters) > 1:
            gone = list(each.adapters)[first]
            before = values(each, gone)
            each.delete_adapter(gone)
            assert same(values(each, gone), before)
            with torch.no_grad():
                live = logits(each)
                with each.adapters_disabled():
                    assert not torch.equal(logits(each), live)


def values(model: Model, beside: str) -> dict[str, Tensor]:
    """Return copies of the trained values of all adapters but one."""
    tensors = [(name, t) for name in model.adapters if name != beside for t in model.stack.tensors(name)]
    return {f"{name}.{t.name}": t.value.clone() for name, t in tensors}
