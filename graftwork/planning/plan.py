"""Plan: what a run will train, hold, compute and write, and what would stop it, told before it is built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graftwork.models.base import Model
from graftwork.peft import report
from graftwork.planning import activations, flops, show
from graftwork.planning.blueprint import world_of_one
from graftwork.planning.checks import Intent, fitting, layout_problems, row_problems
from graftwork.planning.devices import DEVICES, Device
from graftwork.planning.figures import Figures, OnDevice
from graftwork.planning.flops import Flops, GraphFlops
from graftwork.planning.memory import Setting, memory
from graftwork.planning.parameters import held
from graftwork.planning.problem import Problem
from graftwork.planning.samples import Kind, Sample, kinds_of, sample
from graftwork.planning.speed import speed
from graftwork.planning.stages import Stage, stages
from graftwork.planning.workload import Workload
from graftwork.training.callbacks.room import ARTIFACT
from graftwork.training.summary import count_parameters


@dataclass(frozen=True)
class Plan(Figures):
    """What a run will be, printable."""

    def __str__(self) -> str:
        return show.as_text(self)


@dataclass(frozen=True)
class Measured:
    """What is known of a model in a layout, whatever the device: its pipeline stages, FLOPs, activations."""

    stages: tuple[Stage, ...]
    flops: GraphFlops
    activations: activations.Activations


def make_plan(intent: Intent, devices: Sequence[Device] = tuple(DEVICES.values()), name: str = "") -> Plan:
    """Plan a run. No weights, no GPU and no process of another rank are needed; nothing is downloaded.

    Memory and time are those on ``devices``; without any, only counts and problems are told.
    """
    blueprint = intent.blueprint
    problems, of_rows = layout_problems(intent), row_problems(intent)
    with world_of_one():
        whole, misfits = fitting(replace(blueprint, recompute=None))
        kept = replace(blueprint, transforms=tuple(whole.stack.transforms.values()))
        trainable, total = count_parameters(whole)
        found: tuple[OnDevice, ...] = ()
        tokens: Flops | None = None
        known = blueprint.shape.num_moe_experts is None  # experts' rows depend on values
        if devices and known and not problems and not of_rows:
            measured = measure(replace(intent, blueprint=kept), whole)
            per_step = intent.workload.micro_batch_size * intent.workload.row_tokens
            tokens = measured.flops.whole.times(1 / per_step)
            found = tuple(on_device(intent, measured, device) for device in devices)
        sites = tuple(report.sites(whole.stack))
    artifact = ARTIFACT * trainable if blueprint.transforms else total * blueprint.width
    problems += [*misfits, *of_rows, *([] if misfits else _too_large(found))]
    return Plan(
        name, intent.layout, intent.world, sites, trainable, total, artifact, tokens, found, problems=tuple(problems)
    )


@dataclass(frozen=True)
class Outlook:
    """What trains, of how many parameters, and the bytes of the fullest rank; None where they cannot be told."""

    trainable: int
    total: int
    peak: float | None


def look_ahead(intent: Intent, device: Device) -> Outlook:
    """Return what a plan says first, in a fraction of its time: operations, which take the most, are not counted."""
    with world_of_one():
        whole, misfits = fitting(replace(intent.blueprint, recompute=None))
        trainable, total = count_parameters(whole)
        told = [*misfits, *layout_problems(intent), *row_problems(intent)]
        if told or intent.blueprint.shape.num_moe_experts is not None:  # experts' rows depend on values
            return Outlook(trainable, total, None)
        parameters = held(whole)
        kinds, setting = kinds_of(parameters), setting_of(intent, device)
        full = Sample(whole, {kind: kind.layers[0] for kind in kinds})
        needed = activations.measure(_cut(intent, full, kinds), dealt(intent), intent.layout)
        ranks = memory(tuple(stages(parameters, intent.layout, setting.microbatches)), needed, setting)
        return Outlook(trainable, total, max(rank.total for rank in ranks))


def measure(intent: Intent, whole: Model) -> Measured:
    """Count and measure on ``whole``, the drafted model that is not cut and recomputes nothing."""
    parameters = held(whole)
    kinds = kinds_of(parameters)
    full = Sample(whole, {kind: kind.layers[0] for kind in kinds})
    return Measured(
        stages=tuple(stages(parameters, intent.layout, setting_of(intent, next(iter(DEVICES.values()))).microbatches)),
        flops=flops.count(full, intent.workload, intent.blueprint.recompute),
        activations=activations.measure(_cut(intent, full, kinds), dealt(intent), intent.layout),
    )


def on_device(intent: Intent, measured: Measured, device: Device) -> OnDevice:
    """Return memory and time on one device."""
    setting = setting_of(intent, device)
    held_there = tuple(memory(measured.stages, measured.activations, setting))
    return OnDevice(device, held_there, speed(measured.stages, measured.flops, setting, intent.blueprint.dtype))


def _cut(intent: Intent, full: Sample, kinds: Sequence[Kind]) -> Sample:
    layout, blueprint = intent.layout, intent.blueprint
    if layout.tensor_model_parallel_size == 1 and blueprint.recompute is None:
        return full
    return sample(blueprint.cut(layout.tensor_model_parallel_size, layout.sequence_parallel), kinds)


def dealt(intent: Intent) -> Workload:
    """Return the rows as a rank's output layer sees them: under sequence parallelism logits are made of all."""
    return replace(intent.workload, answer_share=1.0) if intent.layout.sequence_parallel else intent.workload


def setting_of(intent: Intent, device: Device) -> Setting:
    """Return what memory and time of a rank depend on."""
    return Setting(
        shape=intent.blueprint.shape,
        width=intent.blueprint.width,
        layout=intent.layout,
        workload=intent.workload,
        replicas=intent.layout.data_parallel_size(intent.world),
        device=device,
        shards=intent.shards,
    )


def _too_large(found: Sequence[OnDevice]) -> list[Problem]:
    """A run that fits on none of the devices needs another layout."""
    if not found or any(one.fits for one in found):
        return []
    best = max(found, key=lambda one: one.device.memory)
    return [
        Problem(
            "trainer.strategy",
            f"the fullest rank needs {show.size(best.peak)}, a {best.device.name} has {show.size(best.device.memory)}: "
            "divide the model over more devices (tensor_model_parallel_size, pipeline_model_parallel_size), or set "
            'model.recompute="full" or data.micro_batch_size=1; --fit finds what fits.',
        )
    ]
