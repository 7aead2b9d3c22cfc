"""Judge: measures a model once, and says what any layout, recomputation and microbatch of it takes on a device."""

from dataclasses import dataclass, replace
from functools import cached_property

from graftwork.layout import Layout
from graftwork.planning import activations, flops
from graftwork.planning.activations import Activations
from graftwork.planning.checks import STRATEGY, Intent, fitting
from graftwork.planning.devices import Device
from graftwork.planning.figures import OnDevice
from graftwork.planning.flops import Flops, GraphFlops
from graftwork.planning.memory import StageMemory, memory
from graftwork.planning.parameters import held
from graftwork.planning.plan import dealt, setting_of
from graftwork.planning.samples import Sample, kinds_of, sample
from graftwork.planning.speed import DEVICES_OF_A_NODE, speed
from graftwork.planning.stages import stages

ROOM = 0.95
"""Share of a device's memory that may be planned for: the allocator leaves gaps."""


@dataclass(frozen=True)
class Candidate:
    """One way to run: the run as it would be, what it takes on the device that was asked for."""

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


class Judge:
    """Judges runs of one model, of one kind of rows, on one device; made and used inside of ``world_of_one``.

    Activations are measured for one row and multiplied: they grow with the tokens of a rank.
    """

    def __init__(self, intent: Intent, device: Device) -> None:
        self._whole, _ = fitting(replace(intent.blueprint, recompute=None))
        self._device, self._work = device, intent.workload
        self._kept = replace(intent.blueprint, transforms=tuple(self._whole.stack.transforms.values()))
        self._parameters = held(self._whole)
        self._kinds = kinds_of(self._parameters)
        self._rows: dict[tuple[int, str | None], Activations] = {}

    def fits(self, intent: Intent) -> bool:
        """Whether a run of these sizes leaves the allocator its gaps on the fullest rank."""
        return max(stage.total for stage in self._memory(intent)) <= ROOM * self._device.memory

    def judged(self, intent: Intent) -> Candidate:
        """Return what a run takes whose layout, recomputation and microbatch are those of ``intent``."""
        ready = self._ready(intent)
        setting = setting_of(ready, self._device)
        cut = stages(self._parameters, ready.layout, setting.microbatches)
        counted = _again(self._counted, ready.blueprint.recompute).times(ready.workload.micro_batch_size)
        bound = speed(cut, counted, setting, ready.blueprint.dtype)
        return Candidate(ready, OnDevice(self._device, tuple(self._memory(ready)), bound))

    @cached_property
    def _counted(self) -> GraphFlops:
        full = Sample(self._whole, {kind: kind.layers[0] for kind in self._kinds})
        return flops.count(full, replace(self._work, micro_batch_size=1), None)

    def _memory(self, intent: Intent) -> list[StageMemory]:
        ready = self._ready(intent)
        setting, work, layout = setting_of(ready, self._device), ready.workload, ready.layout
        row = self._row(ready).times(work.micro_batch_size / layout.context_parallel_size)
        return memory(stages(self._parameters, layout, setting.microbatches), row, setting)

    def _ready(self, intent: Intent) -> Intent:
        return replace(intent, blueprint=replace(self._kept, recompute=intent.blueprint.recompute))

    def _row(self, intent: Intent) -> Activations:
        tensor, blueprint = intent.layout.tensor_model_parallel_size, intent.blueprint
        key = (tensor, blueprint.recompute)
        if key not in self._rows:
            layout = Layout(tensor, sequence_parallel=tensor > 1)
            one = replace(intent, layout=layout, workload=replace(intent.workload, micro_batch_size=1))
            drawn = sample(blueprint.cut(tensor, layout.sequence_parallel), self._kinds)
            self._rows[key] = activations.measure(drawn, dealt(one), layout)
        return self._rows[key]


def _again(counted: GraphFlops, recompute: str | None) -> GraphFlops:
    def repeated(one: Flops) -> Flops:
        return replace(one, again={"full": one.forward, "selective": one.attention}.get(recompute or "", 0.0))

    return GraphFlops({kind: repeated(one) for kind, one in counted.layers.items()}, counted.outside)
