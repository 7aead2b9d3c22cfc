"""Adapters switched off, deleted, frozen: every bit and flag comes back."""

import copy

import pytest
import torch

from graftwork import parallel
from graftwork.errors import MatchError
from graftwork.models import GPT
from graftwork.parallel.sharding import Sharding
from graftwork.peft.adapter import Adapter, Birth, normal
from graftwork.peft.wrapper import AdaptedModule, graft
from graftwork.virtual_tokens import PromptLayout
from tests.contracts.methods import STACKS, adapter_parameters, every_family, every_stack, make, prompted, shake, tokens


def flags(model: GPT) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@every_family
@every_stack
def test_disabled_adapters_leave_the_base(family: str, stack: str) -> None:
    model = make(family)
    base = model(tokens())
    model.add_adapter(STACKS[stack]())
    shake(model)
    ids = prompted(model, tokens())
    adapted, layout, before = model(ids), model.prompt_layout, flags(model)
    with model.adapters_disabled():
        assert torch.equal(model(tokens()), base)
        assert model.prompt_layout == PromptLayout(off=True)
        with model.adapters_disabled():
            assert torch.equal(model(tokens()), base)
        assert torch.equal(model(tokens()), base)
    assert torch.equal(model(ids), adapted)
    assert model.prompt_layout == layout and flags(model) == before


@every_stack
def test_disabling_restores_an_irregular_state_also_after_an_error(stack: str) -> None:
    model = make()
    base = model(tokens())
    model.add_adapter(STACKS[stack]())
    shake(model)
    for index, adapter in enumerate(model.stack.adapters()):
        adapter.enabled = index % 2 == 0
    states = [a.enabled for a in model.stack.adapters()]
    with pytest.raises(ZeroDivisionError), model.adapters_disabled():
        assert torch.equal(model(tokens()), base)
        1 / 0  # noqa: B018
    assert [a.enabled for a in model.stack.adapters()] == states


def test_disabling_inside_a_partly_merged_state() -> None:
    model = make()
    base = model(tokens())
    model.add_adapter(STACKS["all"]())
    shake(model)
    model.merge_adapters(["lora"])
    model.merge_adapters(["ia3"])
    ids = prompted(model, tokens())
    merged, weights = model(ids), {n: p.clone() for n, p in model.named_parameters()}
    with model.adapters_disabled():
        assert torch.equal(model(tokens()), base)
        with model.adapters_disabled():
            assert torch.equal(model(tokens()), base)
    assert torch.equal(model(ids), merged)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert model.stack.merged
    model.unmerge_adapters()
    with model.adapters_disabled():
        assert torch.equal(model(tokens()), base)


@pytest.mark.parametrize("request_", ["add", "delete", "merge", "unmerge"])
def test_the_stack_cannot_change_while_it_is_off(request_: str) -> None:
    model = make()
    model.add_adapter(STACKS["lora"]())
    calls = {
        "add": lambda: model.add_adapter(STACKS["ia3"]()),
        "delete": lambda: model.delete_adapter("lora"),
        "merge": model.merge_adapters,
        "unmerge": model.unmerge_adapters,
    }
    with model.adapters_disabled(), pytest.raises(MatchError, match="leave the adapters_disabled"):
        calls[request_]()
    assert list(model.adapters) == ["lora"]


@every_family
@every_stack
def test_deleting_every_adapter_restores_the_model(family: str, stack: str) -> None:
    model = make(family)
    base, before, names = model(tokens()), flags(model), list(model.state_dict())
    model.add_adapter(STACKS[stack]())
    shake(model)
    for name in list(model.adapters):
        model.delete_adapter(name)
    assert torch.equal(model(tokens()), base)
    assert flags(model) == before and list(model.state_dict()) == names
    assert not any(isinstance(m, AdaptedModule) for m in model.modules())
    assert not model.adapters and model.prompt_layout == PromptLayout()


def test_deleting_one_keeps_the_others_bit_for_bit() -> None:
    model, alone = make(), make()
    model.add_adapter(STACKS["all"]())
    alone.add_adapter(STACKS["lora"]())
    shake(model)
    alone.load_state_dict(model.state_dict(), strict=False)
    for name in ("canonical_adapter", "ptuning", "ia3"):
        model.delete_adapter(name)
    assert torch.equal(model(tokens()), alone(tokens()))
    assert all(p.requires_grad == (".adapters." in n) for n, p in model.named_parameters())


def test_deleting_refuses_an_unknown_name() -> None:
    model = make()
    model.add_adapter(STACKS["lora+ia3"]())
    with pytest.raises(MatchError, match=r"no adapter 'lorra'; did you mean 'lora'\?"):
        model.delete_adapter("lorra")
    assert list(model.adapters) == ["lora", "ia3"]


def test_a_frozen_model_stays_frozen_when_an_adapter_goes() -> None:
    model = make()
    model.add_adapter(STACKS["lora"]())
    model.freeze()
    model.delete_adapter("lora")
    assert not any(flags(model).values())


class Shift(Adapter):
    """Adds a learned vector."""

    def __init__(self, birth: Birth) -> None:
        super().__init__(birth)
        self.new_parameter("shift", Sharding((3,)), normal(1.0))

    def forward(self, inner, x):
        return inner(x) + self.shift


@every_stack
def test_a_copy_of_a_transform_is_the_same_recipe(stack: str) -> None:
    for transform in STACKS[stack]():
        assert repr(copy.deepcopy(transform)) == repr(transform)


def test_a_copy_of_a_wrapped_module_is_its_own() -> None:
    """megatron-core's modules hold process groups, which cannot be copied; the wrapper must not add to that."""
    parallel.ensure_initialized()
    root = torch.nn.Sequential(torch.nn.Linear(3, 3))
    base = root[0]
    birth = Birth(1, "norm", "0", torch.device("cpu"))
    graft(root, "0", "norm", Shift(birth))
    twin = copy.deepcopy(root)
    assert list(twin.state_dict()) == list(root.state_dict()) == ["0.weight", "0.bias", "0.adapters.norm.shift"]
    assert torch.equal(twin(torch.ones(3)), root(torch.ones(3)))
    twin[0].weight.zero_()
    assert twin[0].base is not base and not twin[0].base.weight.any() and base.weight.any()


@every_stack
def test_train_and_eval_reach_bases_and_adapters(stack: str) -> None:
    model = make()
    model.add_adapter(STACKS[stack]())
    for mode in (True, False):
        model.train(mode)
        wrappers = [m for m in model.modules() if isinstance(m, AdaptedModule)]
        assert bool(wrappers) == any(model.stack.grafted.values())
        assert all(w.base.training is mode for w in wrappers)
        assert all(a.training is mode for a in model.stack.adapters())


@every_stack
def test_freezing_stops_everything(stack: str) -> None:
    model = make()
    model.add_adapter(STACKS[stack]())
    model.freeze()
    assert not any(flags(model).values()) and not model.training
    assert list(adapter_parameters(model))
