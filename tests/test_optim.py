"""AdamW: groups and learning rates, schedule, fp32 masters."""

import copy
import math

import pytest
import torch
from torch import nn

from graftwork.errors import ConfigError
from graftwork.optim import FULL_FINE_TUNING_LR, AdamW, MasterAdamW
from graftwork.parallel.record import Record, mark, record_of
from graftwork.parallel.sharding import Sharding


class Transform:
    def __init__(self, default_lr: float, ratio: float = 1.0) -> None:
        self.default_lr, self.ratio = default_lr, ratio

    def lr_scale(self, parameter_name: str) -> float:
        return self.ratio if parameter_name.endswith("lora_B") else 1.0


class Model(nn.Module):
    """A base matrix and vector; LoRA-like and IA3-like adapters under the names real models give them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        low_rank = nn.ParameterDict({"lora_A": torch.randn(2, 4), "lora_B": torch.zeros(4, 2)})
        self.site = nn.ModuleDict({"adapters": nn.ModuleDict({"lora": low_rank})})
        self.other = nn.ModuleDict({"adapters": nn.ModuleDict({"ia3": nn.ParameterDict({"scale": torch.ones(4)})})})
        self.adapters = {"lora": Transform(1e-3, ratio=4.0), "ia3": Transform(1e-2)}
        for owner, holder in (("lora", self.site), ("ia3", self.other)):
            for parameter in holder.parameters():
                mark(parameter, Record(Sharding(tuple(parameter.shape)), owner=owner))


def peft_model() -> Model:
    model = Model()
    model.weight.requires_grad_(False)
    model.bias.requires_grad_(False)
    return model


def lr_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}


def test_each_adapter_trains_at_its_own_rate_and_nothing_frozen_is_held() -> None:
    model = peft_model()
    optimizer, _ = AdamW().build(model, 10)
    assert lr_by_name(optimizer, model) == {
        "site.adapters.lora.lora_A": 1e-3,
        "site.adapters.lora.lora_B": 4e-3,
        "other.adapters.ia3.scale": 1e-2,
    }
    assert {group["name"] for group in optimizer.param_groups} == {"lora", "ia3"}


def test_given_lr_replaces_the_defaults_but_not_the_ratio() -> None:
    model = peft_model()
    optimizer, _ = AdamW(lr=1e-4).build(model, 10)
    assert sorted(lr_by_name(optimizer, model).values()) == [1e-4, 1e-4, 4e-4]


def test_full_fine_tuning_has_one_small_rate_and_vectors_do_not_decay() -> None:
    model = nn.Linear(3, 3)
    optimizer, _ = AdamW(weight_decay=0.1).build(model, 10)
    assert set(lr_by_name(optimizer, model).values()) == {FULL_FINE_TUNING_LR}
    assert {tuple(g["params"][0].shape): g["weight_decay"] for g in optimizer.param_groups} == {(3, 3): 0.1, (3,): 0.0}


def test_a_rank_without_trainable_parameters_steps() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    optimizer, scheduler = AdamW().build(model, 10)
    optimizer.step(lambda: 1.0)
    scheduler.step()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule_equals_its_formula(schedule: str) -> None:
    optimizer, scheduler = AdamW(lr=2.0, warmup_steps=4, schedule=schedule, min_lr_ratio=0.1).build(nn.Linear(1, 1), 20)
    seen = []
    for _ in range(22):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    done = [min(1.0, (k - 4) / 16) for k in range(4, 22)]
    tail = {
        "cosine": [0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * d)) for d in done],
        "linear": [0.2 + 1.8 * (1 - d) for d in done],
        "constant": [2.0] * 18,
    }[schedule]
    assert seen == pytest.approx([0.5, 1.0, 1.5, 2.0, *tail], rel=1e-12)


def test_schedule_continues_from_its_state() -> None:
    optimizer, scheduler = AdamW(lr=1.0, warmup_steps=3).build(nn.Linear(1, 1), 9)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    other, resumed = AdamW(lr=1.0, warmup_steps=3).build(nn.Linear(1, 1), 9)
    resumed.load_state_dict(scheduler.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    other.step()
    resumed.step()
    optimizer.step()
    scheduler.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"beta2": 1.5}, "beta2"),
        ({"schedule": "cosin"}, "cosine"),
        ({"min_lr_ratio": 2}, "min_lr"),
    ],
)
def test_impossible_values_are_refused(arguments: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        AdamW(**arguments)


def test_decay_without_a_last_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        AdamW().build(nn.Linear(1, 1), math.inf)


def quadratic_steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int) -> None:
    target = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
    for _ in range(steps):
        optimizer.zero_grad()
        ((parameter.float() - target) ** 2).sum().backward()
        optimizer.step()


def test_masters_follow_torch_adamw_in_fp32_while_bf16_alone_would_stall() -> None:
    start = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    low = nn.Parameter(start.clone())
    plan = AdamW(lr=1e-4, schedule="constant", weight_decay=0.01)
    optimizer, _ = plan.build(nn.ParameterList([low]), 100)
    assert isinstance(optimizer, MasterAdamW)
    master = nn.Parameter(start.float())
    oracle = torch.optim.AdamW([master], lr=1e-4, weight_decay=0.01, eps=1e-8)
    for _ in range(60):
        gradient = torch.sin(torch.arange(64.0)).reshape(8, 8).bfloat16()
        low.grad, master.grad = gradient.clone(), gradient.float()
        optimizer.step()
        oracle.step()
    assert torch.equal(optimizer.state[low]["master"], master)
    assert torch.equal(low, master.bfloat16())
    stalled = nn.Parameter(start.clone())
    plain = torch.optim.AdamW([stalled], lr=1e-4, weight_decay=0.01)
    for _ in range(60):
        stalled.grad = torch.sin(torch.arange(64.0)).reshape(8, 8).bfloat16()
        plain.step()
    assert not torch.equal(stalled, low)


def test_fp32_accumulator_is_stepped_with_when_present() -> None:
    low = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    low.main_grad = torch.full((4,), 0.5)  # type: ignore[attr-defined]
    optimizer, _ = AdamW(lr=0.5, schedule="constant").build(nn.ParameterList([low]), 10)
    optimizer.step()
    assert torch.equal(low.float(), torch.full((4,), -0.5))


def test_masters_and_moments_survive_a_state_dict_bit_for_bit() -> None:
    torch.manual_seed(3)
    low = nn.Parameter(torch.randn(4, 4).bfloat16())
    optimizer, _ = AdamW(lr=1e-3).build(nn.ParameterList([low]), 100)
    quadratic_steps(optimizer, low, 3)
    twin = nn.Parameter(low.detach().clone())
    resumed, _ = AdamW(lr=1e-3).build(nn.ParameterList([twin]), 100)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state[twin]["master"].dtype == resumed.state[twin]["exp_avg"].dtype == torch.float32
    quadratic_steps(optimizer, low, 3)
    quadratic_steps(resumed, twin, 3)
    assert torch.equal(low, twin)
    assert all(torch.equal(optimizer.state[low][k], resumed.state[twin][k]) for k in optimizer.state[low])


def test_mixed_precision_group_steps_fp32_parameters_themselves() -> None:
    low, full = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3, 3))
    optimizer, _ = AdamW(lr=1e-2, schedule="constant").build(nn.ParameterList([low, full]), 10)
    low.grad, full.grad = torch.ones(3, 3, dtype=torch.bfloat16), torch.ones(3, 3)
    optimizer.step()
    assert "master" not in optimizer.state[full]
    assert torch.equal(optimizer.state[low]["master"], full)


def test_whose_a_parameter_is_stands_in_its_record_not_in_its_name() -> None:
    model = Model()
    model.bias.requires_grad_(False)
    mark(model.weight, Record(Sharding((4, 4)), owner="ia3"))
    rates = {group["name"]: group["lr"] for group in AdamW().parameter_groups(nn.ModuleDict({"renamed": model}))}
    assert rates.keys() == {"lora", "ia3"} and record_of(model.bias).owner is None
    groups = AdamW().parameter_groups(model)
    assert any(p is model.weight for g in groups if g["name"] == "ia3" and g["lr"] == 1e-2 for p in g["params"])
