"""AdamW over what trains: one learning rate per adapter, fp32 masters for low-precision weights, warm-up and decay."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional, Protocol, TypeAlias

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LRScheduler

from graftwork.errors import CheckpointError, ConfigError, suggest
from graftwork.jsonfile import validated
from graftwork.parallel.record import record_of

FULL_FINE_TUNING_LR = 2e-5
SCHEDULES = ("constant", "cosine", "linear")
MAIN_GRAD = "main_grad"
"""megatron-core's name for a low-precision parameter's fp32 accumulator."""
Group: TypeAlias = dict[str, Any]
"""A parameter group of torch's optimizers."""


class Transform(Protocol):
    """What the optimizer asks of the transform that owns a parameter."""

    @property
    def default_lr(self) -> float:
        """Peak learning rate of its method."""
        ...

    def lr_scale(self, parameter_name: str) -> float:
        """Return the factor on the learning rate of one of its parameters."""
        ...


class AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101) and a learning-rate schedule.

    Args:
        lr: Peak learning rate of every trainable parameter; default: each adapter's own (``default_lr`` of its method),
            2e-5 in full fine-tuning.
        weight_decay: Decay of matrices; vectors (biases, norms, IA3 scales) never decay.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        warmup_steps: Steps of linear warm-up; the first step already has 1 / warmup_steps of the peak.
        schedule: ``cosine``, ``linear`` or ``constant`` after the warm-up, until the last step.
        min_lr_ratio: Learning rate at the end over the peak.
    """

    def __init__(
        self,
        lr: Optional[float] = None,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        warmup_steps: int = 0,
        schedule: str = "cosine",
        min_lr_ratio: float = 0.0,
    ) -> None:
        _check_range("lr", lr if lr is not None else 1.0, 0.0, math.inf)
        _check_range("weight_decay", weight_decay, 0.0, math.inf)
        _check_range("beta1", beta1, 0.0, 1.0)
        _check_range("beta2", beta2, 0.0, 1.0)
        _check_range("min_lr_ratio", min_lr_ratio, 0.0, 1.0)
        _check_range("warmup_steps", warmup_steps, 0, math.inf)
        if schedule not in SCHEDULES:
            raise ConfigError(f"AdamW(schedule={schedule!r}) is unknown; {suggest(schedule, SCHEDULES)}")
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, (beta1, beta2), eps
        self.warmup_steps, self.schedule, self.min_lr_ratio = warmup_steps, schedule, min_lr_ratio

    def options(self) -> dict[str, object]:
        """Return the constructor's arguments by name."""
        given = {name: getattr(self, name) for name in ("lr", "weight_decay")}
        moments = {"beta1": self.betas[0], "beta2": self.betas[1], "eps": self.eps}
        return given | moments | {name: getattr(self, name) for name in ("warmup_steps", "schedule", "min_lr_ratio")}

    def build(self, model: nn.Module, total_steps: float) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """Return the optimizer over ``model``'s trainable parameters and its schedule over ``total_steps`` steps.

        A rank that holds no trainable parameter (a later pipeline stage under P-tuning) gets an optimizer of nothing.
        """
        groups = self.parameter_groups(model) or [{"params": [], "name": "nothing", "lr": 0.0}]
        low = any(p.dtype != torch.float32 for group in groups for p in group["params"])
        optimizer = (MasterAdamW if low else torch.optim.AdamW)(groups, betas=self.betas, eps=self.eps)
        return optimizer, WarmupDecay(optimizer, self.factor(total_steps))

    def parameter_groups(self, model: nn.Module) -> list[Group]:
        """Group the trainable parameters by owner, learning rate and decay; ``name`` labels the group in logs."""
        groups: dict[tuple[str, float, float], Group] = {}
        transforms: Mapping[str, Transform] = getattr(model, "adapters", {})
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            owner = record_of(parameter).owner
            lr = self._peak(transforms.get(owner) if owner else None, name)
            decay = self.weight_decay if parameter.ndim > 1 else 0.0
            label = owner or "base"
            group = groups.setdefault(
                (label, lr, decay), {"params": [], "name": label, "lr": lr, "weight_decay": decay}
            )
            group["params"].append(parameter)
        return list(groups.values())

    def factor(self, total_steps: float) -> Callable[[int], float]:
        """Return the function from step (0-based) to learning rate over the peak."""
        if self.schedule != "constant" and not 0 < total_steps < math.inf:
            raise ConfigError(
                f"AdamW(schedule={self.schedule!r}) needs to know the last step: "
                "set trainer.max_steps or trainer.max_epochs, or schedule='constant'."
            )
        return lambda step: self._factor(step, total_steps)

    def _factor(self, step: int, total_steps: float) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1.0, total_steps - self.warmup_steps))
        shape = 0.5 * (1.0 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0 - done
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * shape

    def _peak(self, transform: Transform | None, parameter_name: str) -> float:
        if transform is None:
            return self.lr if self.lr is not None else FULL_FINE_TUNING_LR
        return (self.lr if self.lr is not None else transform.default_lr) * transform.lr_scale(parameter_name)


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """Return the gradient to step with: the fp32 accumulator of a low-precision parameter, else ``.grad``."""
    main: Tensor | None = getattr(parameter, MAIN_GRAD, None)
    return parameter.grad if main is None else main


class _ScheduleState(BaseModel):
    step: int = Field(strict=True, ge=0, le=2**60)


class WarmupDecay(LRScheduler):
    """Learning rate = peak * factor(step); its state is the step alone, so it survives another pipeline layout."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        self.factor = factor
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return one learning rate per parameter group."""
        return [peak * self.factor(self.last_epoch) for peak in self.base_lrs]

    def state_dict(self) -> dict[str, int]:
        """Return the step."""
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to the saved step."""
        saved = validated(state_dict, _ScheduleState, "the state of the learning rate's schedule", CheckpointError)
        self.last_epoch = self._step_count = saved.step
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = lr


class MasterAdamW(torch.optim.AdamW):
    """torch's AdamW whose low-precision parameters step on fp32 masters, kept in the state as ``master``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Evaluate ``closure`` if given, then step the masters and round them into the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group, [p for p in group["params"] if gradient_of(p) is not None])
        return loss

    def _step_group(self, group: Group, parameters: list[nn.Parameter]) -> None:
        states = [self._state(p) for p in parameters]
        masters = [state.get("master", p) for state, p in zip(states, parameters)]
        adamw(
            masters,
            [gradient.float() for gradient in map(gradient_of, parameters) if gradient is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for master, parameter in zip(masters, parameters):
            if master is not parameter:
                parameter.copy_(master)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().to(torch.float32, copy=True)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; torch would round masters and moments to the parameter's precision, so they are put back."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            self._put_back(parameters[index], saved.items())

    def _put_back(self, parameter: nn.Parameter, saved: Iterable[tuple[str, object]]) -> None:
        for key, value in saved:
            if key != "step" and isinstance(value, Tensor):
                self.state[parameter][key] = value.detach().clone().to(parameter.device)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, int | float) and low <= value <= high):
        raise ConfigError(f"AdamW({name}={value!r}) must lie between {low} and {high}.")
