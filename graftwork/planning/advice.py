"""Advice: the layouts, recomputation and microbatches with which a run fits so many devices, fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from graftwork.errors import ConfigError, quoted
from graftwork.layout import Layout, valid_tensor_sizes
from graftwork.models.recompute import RECOMPUTE
from graftwork.planning import activations, flops, show
from graftwork.planning.activations import Activations
from graftwork.planning.blueprint import world_of_one
from graftwork.planning.checks import STRATEGY, Intent, fitting, layout_problems
from graftwork.planning.devices import Device, device_named
from graftwork.planning.figures import OnDevice
from graftwork.planning.flops import Flops, GraphFlops
from graftwork.planning.memory import memory
from graftwork.planning.parameters import Held, held
from graftwork.planning.plan import dealt, setting_of
from graftwork.planning.samples import Sample, kinds_of, sample
from graftwork.planning.speed import DEVICES_OF_A_NODE, speed
from graftwork.planning.stages import stages

ROOM = 0.95
"""Share of a device's memory that may be planned for: the allocator leaves gaps."""
POWERS = tuple(2**n for n in range(8))


@dataclass(frozen=True)
class Candidate:
    """One way to fit: the run as it would be, what it takes on the device that was asked for."""

    intent: Intent
    on: OnDevice

    def overrides(self) -> list[str]:
        """Return the fields of the recipe to set, as the command line takes them."""
        layout, world = self.intent.layout, self.intent.world
        nodes = -(-world // DEVICES_OF_A_NODE)
        fields = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        return [
            f"trainer.num_nodes={nodes}",
            f"trainer.devices={world // nodes}",
            *(f"{STRATEGY}.{name}={getattr(layout, name)}" for name in fields),
            f"{STRATEGY}.sequence_parallel={layout.sequence_parallel}",
            f"model.recompute={self.intent.blueprint.recompute}",
            f"data.micro_batch_size={self.intent.workload.micro_batch_size}",
        ]


def parse_fit(text: str) -> tuple[int, Device]:
    """Return number and kind of ``8xH100``; raises ConfigError for anything else."""
    count, _, name = text.partition("x")
    if not count.isdigit() or int(count) == 0 or not name:
        raise ConfigError(f"--fit {quoted(text)} is no number of devices; write for example 8xH100.")
    return int(count), device_named(name)


def advise(intent: Intent, world: int, device: Device) -> list[Candidate]:
    """Return what fits ``world`` devices, fastest first by the bound of a step; of equals the one that keeps most room.

    Activations are measured for one row and multiplied: they grow with the tokens of a rank.
    """
    if intent.blueprint.shape.num_moe_experts is not None:
        raise ConfigError("a mixture of experts cannot be fitted: its activations depend on how tokens are routed.")
    with world_of_one():
        whole, _ = fitting(replace(intent.blueprint, recompute=None))
        kept = replace(intent.blueprint, transforms=tuple(whole.stack.transforms.values()))
        parameters = held(whole)
        kinds = kinds_of(parameters)
        full = Sample(whole, {kind: kind.layers[0] for kind in kinds})
        counted = flops.count(full, replace(intent.workload, micro_batch_size=1), None)
        found = []
        for tensor in _tensor_sizes(intent, world):
            for recompute in (None, *RECOMPUTE):
                layout = Layout(tensor, sequence_parallel=tensor > 1)
                one = replace(intent, blueprint=replace(kept, recompute=recompute), layout=layout)
                one = replace(one, workload=replace(one.workload, micro_batch_size=1))
                row = activations.measure(sample(one.blueprint.cut(tensor, tensor > 1), kinds), dealt(one), layout)
                for candidate in _settings(one, world):
                    ready = _judged(candidate, row, _again(counted, recompute), parameters, device)
                    found += [ready] if ready.on.peak <= ROOM * device.memory else []
    return sorted(found, key=lambda one: (one.on.speed.seconds, one.on.peak))


def as_text(candidates: list[Candidate], world: int, device: Device, most: int = 5) -> str:
    """Return the best candidates as a table and as overrides."""
    if not candidates:
        return f"nothing fits {world} x {device.name}: take more devices, shorter rows or fewer trained parameters."
    head = (
        "",
        "tensor",
        "pipeline",
        "context",
        "recompute",
        "micro batch",
        "peak",
        "step at least",
        "tokens/s at most",
    )
    rows: list[tuple[str, ...]] = [head]
    for number, one in enumerate(candidates[:most], 1):
        layout = one.intent.layout
        sizes = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
        speed_of = one.on.speed
        rows.append(
            (
                f"{number}", *map(str, sizes), str(one.intent.blueprint.recompute),
                str(one.intent.workload.micro_batch_size), show.size(one.on.peak),
                f"{speed_of.seconds:.3g} s", f"{speed_of.tokens_per_second:,.0f}",
            )
        )  # fmt: skip
    lines = [f"what fits {world} x {device.name}, fastest first ({len(candidates)} in all)", *show.table(rows), ""]
    return "\n".join([*lines, "the first one, as overrides:", " ".join(candidates[0].overrides())])


def _tensor_sizes(intent: Intent, world: int) -> list[int]:
    valid = valid_tensor_sizes(intent.blueprint.shape)
    return [n for n in valid if world % n == 0 and n <= DEVICES_OF_A_NODE]


def _settings(intent: Intent, world: int) -> Iterator[Intent]:
    """Yield every division by pipeline and context, and every microbatch, that the rules of a layout allow."""
    shape, work = intent.blueprint.shape, intent.workload
    for pipeline in POWERS if not shape.undivided else (1,):
        for context in POWERS[:4] if not shape.undivided else (1,):
            layout = replace(intent.layout, pipeline_model_parallel_size=pipeline, context_parallel_size=context)
            if world % layout.model_ranks or work.seq_length % layout.pad_to_multiple:
                continue
            for micro in (n for n in POWERS if n <= work.global_batch_size):
                found = replace(intent, layout=layout, world=world, workload=replace(work, micro_batch_size=micro))
                if not layout_problems(found):
                    yield found


def _again(counted: GraphFlops, recompute: str | None) -> GraphFlops:
    def repeated(one: Flops) -> Flops:
        return replace(one, again={"full": one.forward, "selective": one.attention}.get(recompute or "", 0.0))

    return GraphFlops({kind: repeated(one) for kind, one in counted.layers.items()}, counted.outside)


def _judged(intent: Intent, row: Activations, counted: GraphFlops, parameters: list[Held], device: Device) -> Candidate:
    work, layout = intent.workload, intent.layout
    setting = setting_of(intent, device)
    cut = stages(parameters, layout, setting.microbatches)
    held_there = memory(cut, row.times(work.micro_batch_size / layout.context_parallel_size), setting)
    bound = speed(cut, counted.times(work.micro_batch_size), setting, intent.blueprint.dtype)
    return Candidate(intent, OnDevice(device, tuple(held_there), bound))
