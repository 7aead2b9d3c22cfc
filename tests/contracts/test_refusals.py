"""What cannot be attached is refused in one sentence and leaves no trace."""

from typing import Any

import pytest
import torch

from graftwork.errors import ConfigError, GraftworkError, MatchError
from graftwork.models import GPT
from graftwork.peft import IA3, PEFT, CanonicalAdapter, LoRA, PTuning
from tests.contracts.methods import STACKS, every_family, every_stack, make, shake, shape, tokens

BAD: dict[str, tuple[Any, str]] = {
    "target": (
        lambda: LoRA(target_modules=["linear_qkv", "linear_qv"]),
        r"'linear_qv' matches no module; did you mean",
    ),
    "no linear": (lambda: LoRA(target_modules=["mlp"]), "'mlp' matches no module"),
    "layer": (lambda: LoRA(layers=[0, 2]), "layers has 2, but the model's layers are 0 to 1"),
    "negative layer": (lambda: CanonicalAdapter(layers=[-1]), "layers has -1"),
    "no layers": (lambda: IA3(layers=[]), "layers is an empty list"),
    "embedding in layers": (
        lambda: LoRA(target_modules=["word_embeddings"], layers=[0]),
        r"'word_embeddings' matches no module in layers \[0\]",
    ),
    "rank pattern": (lambda: LoRA(rank_pattern={"layers.7.mlp.linear_fc1": 2}), "rank_pattern .* matches no site"),
    "alpha pattern": (lambda: LoRA(alpha_pattern={"nope": 2}), "alpha_pattern 'nope' matches no site"),
}


def everything(model: GPT) -> dict[str, tuple[bool, torch.Tensor]]:
    return {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}


def assert_untouched(model: GPT, before: dict[str, tuple[bool, torch.Tensor]], layout: Any) -> None:
    after = everything(model)
    assert list(after) == list(before) and model.prompt_layout == layout
    assert all(after[n][0] == before[n][0] and torch.equal(after[n][1], before[n][1]) for n in before)


@pytest.mark.fault(
    "a failing add leaves half of the adapters attached",
    "all or nothing: the model is as it was",
)
@pytest.mark.parametrize("case", BAD)
def test_a_failing_add_leaves_no_half_state(case: str) -> None:
    bad, message = BAD[case]
    model = make()
    before, layout = everything(model), model.prompt_layout
    with pytest.raises(GraftworkError, match=message) as caught:
        model.add_adapter(bad())
    assert "\n" not in str(caught.value)
    assert_untouched(model, before, layout)
    with pytest.raises(GraftworkError, match=message):
        model.add_adapter([PTuning(virtual_tokens=2), CanonicalAdapter("good", dim=4), bad()])
    assert_untouched(model, before, layout)
    # the base is still frozen by the next add
    model.add_adapter(IA3("scales"))
    assert all(p.requires_grad == (".adapters." in n) for n, p in model.named_parameters())


@every_stack
def test_a_failing_add_keeps_the_adapters_that_were_there(stack: str) -> None:
    model = make()
    model.add_adapter(STACKS[stack]())
    shake(model)
    model.train_adapters([])
    before, layout = everything(model), model.prompt_layout
    with pytest.raises(MatchError):
        model.add_adapter([PTuning("second", virtual_tokens=2), LoRA("third", target_modules=["nope"])])
    assert_untouched(model, before, layout)


@every_family
@every_stack
def test_a_taken_name_is_refused(family: str, stack: str) -> None:
    model = make(family)
    model.add_adapter(STACKS[stack]())
    before, layout = everything(model), model.prompt_layout
    for transform in STACKS[stack]():
        with pytest.raises(MatchError, match=f"already has an adapter named '{transform.name}'"):
            model.add_adapter(transform)
    assert_untouched(model, before, layout)


@every_stack
def test_adding_the_same_transform_again_is_a_no_op(stack: str) -> None:
    model, transforms = make(), STACKS[stack]()
    model.add_adapter(transforms)
    before, layout = everything(model), model.prompt_layout
    model.add_adapter(transforms)
    assert_untouched(model, before, layout)


def test_requests_before_the_model_exists_are_queued_and_checked() -> None:
    model = GPT(shape(), dtype="fp32")
    lora = LoRA(dim=4)
    model.add_adapter(lora)
    model.add_adapter([lora, IA3()])
    with pytest.raises(MatchError, match="already has an adapter named 'lora'"):
        model.add_adapter(LoRA())
    model.add_adapter(PTuning(virtual_tokens=2))
    model.delete_adapter("ptuning")
    model.freeze()
    assert list(model.adapters) == ["lora", "ia3"]
    with pytest.raises(ConfigError, match="not built yet"):
        model.merge_adapters()
    model.configure_model()
    assert list(model.adapters) == ["lora", "ia3"] and not any(p.requires_grad for p in model.parameters())


def test_a_queued_request_that_fails_is_not_forgotten() -> None:
    """Otherwise the second call would silently train the whole base."""
    model = GPT(shape(), dtype="fp32")
    model.add_adapter([IA3(), LoRA(target_modules=["nope"])])
    for _ in range(2):
        with pytest.raises(MatchError, match="'nope'"):
            model.configure_model()
    model.delete_adapter("lora")
    model.add_adapter(LoRA(dim=4))
    model.configure_model()
    assert list(model.adapters) == ["ia3", "lora"]
    assert all(p.requires_grad == (".adapters." in n) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: LoRA(name="a.b"), "letters, digits"),
        (lambda: LoRA(name=""), "letters, digits"),
        (lambda: LoRA(name=None), "letters, digits"),
        (lambda: LoRA(name="keys"), "cannot be named 'keys'"),
        (lambda: LoRA(name="training"), "cannot be named 'training'"),
        (lambda: LoRA(dim=0), "dim must be a whole number above 0, got 0"),
        (lambda: LoRA(dim=2.5), "dim must be a whole number"),
        (lambda: LoRA(dim=True), "dim must be a whole number"),
        (lambda: LoRA(alpha=0), "alpha must be above 0"),
        (lambda: LoRA(alpha="16"), "alpha must be above 0"),
        (lambda: LoRA(alpha=float("nan")), "alpha must be above 0"),
        (lambda: LoRA(dropout=1.0), r"dropout must be in \[0, 1\)"),
        (lambda: LoRA(dropout_position="mid"), "dropout_position is 'mid'; valid: post, pre"),
        (lambda: LoRA(lora_A_init_method="xaver"), "did you mean 'xavier'"),
        (lambda: LoRA(lora_A_init_method="zero"), "A and B both start at zero"),
        (lambda: LoRA(target_modules=[]), "target_modules is empty"),
        (lambda: LoRA(lr_ratio_B=0), "lr_ratio_B must be above 0"),
        (lambda: LoRA(rank_pattern={"linear_fc1": 0}), "must be a whole number above 0"),
        (lambda: LoRA(alpha_pattern={"linear_fc1": -1}), "must be above 0"),
        (lambda: CanonicalAdapter(sites=["atention"]), "did you mean 'attention'"),
        (lambda: CanonicalAdapter(sites=[]), "sites is empty"),
        (lambda: CanonicalAdapter(activation="swiglu"), "activation is 'swiglu'"),
        (lambda: CanonicalAdapter(norm_position="mid"), "norm_position is 'mid'"),
        (lambda: CanonicalAdapter(dim=0), "dim must be a whole number"),
        (lambda: IA3(targets=["q"]), "targets is 'q'; valid: ffn, k, v"),
        (lambda: IA3(targets=[]), "targets is empty"),
        (lambda: IA3(key_position="before"), "key_position is 'before'"),
        (lambda: PTuning(virtual_tokens=0), "virtual_tokens must be a whole number"),
        (lambda: PTuning(placement="suffix"), "placement is 'suffix'"),
    ],
)
def test_bad_options_are_refused_at_birth(make_one: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_one()
    assert "\n" not in str(caught.value)


@every_stack
def test_a_transform_rebuilds_from_its_hyperparameters(stack: str) -> None:
    for transform in STACKS[stack]():
        twin = type(transform)(**transform.hyperparameters())
        assert isinstance(twin, PEFT) and repr(twin) == repr(transform)


def test_nothing_is_attached_inside_adapters() -> None:
    """A pattern over everything finds the base's linears only, whatever stands there already."""
    model = make()
    model.add_adapter(LoRA(dim=2, target_modules=["*"]))
    sites = {g.site.name for g in model.stack.grafted["lora"]}
    model.add_adapter([LoRA("again", dim=2, target_modules=["*"]), CanonicalAdapter(dim=4)])
    assert {g.site.name for g in model.stack.grafted["again"]} == sites
    assert not any("adapters" in site.path.split(".") for site in model.stack.host.sites())
    assert tokens().shape == model(tokens()).shape[:2]
