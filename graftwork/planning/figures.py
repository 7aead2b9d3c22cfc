"""Figures of a plan: what a run will train, hold and compute, as plain data."""

import json
from dataclasses import asdict, dataclass, field

from graftwork.layout import Layout
from graftwork.peft.report import SiteReport
from graftwork.planning.base import BaseFindings
from graftwork.planning.devices import Device
from graftwork.planning.flops import Flops
from graftwork.planning.memory import StageMemory
from graftwork.planning.problem import Problem
from graftwork.planning.rows import RowsFindings
from graftwork.planning.speed import Speed


@dataclass(frozen=True)
class OnDevice:
    """What a run is on one device: memory of every pipeline stage, whether it fits, the bound of a step."""

    device: Device
    memory: tuple[StageMemory, ...]
    speed: Speed

    @property
    def peak(self) -> float:
        """Bytes on the fullest rank."""
        return max(stage.total for stage in self.memory)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room."""
        return self.peak <= self.device.memory


@dataclass(frozen=True)
class Figures:
    """What a run will be. Counts are of the whole model, un-sharded; memory is in bytes, of one rank of a stage.

    ``flops`` are those of one token; ``artifact_bytes`` of the adapter directory (of the model, in full fine-tuning);
    ``devices``: memory and time on each that was asked for, none where the layout does not work.
    """

    name: str
    layout: Layout
    world: int
    sites: tuple[SiteReport, ...]
    trainable_parameters: int
    total_parameters: int
    artifact_bytes: int
    flops: Flops | None = None
    devices: tuple[OnDevice, ...] = ()
    rows: RowsFindings | None = None
    base: BaseFindings | None = None
    problems: tuple[Problem, ...] = field(default=())

    @property
    def memory_per_rank(self) -> tuple[StageMemory, ...]:
        """Memory of every pipeline stage, on the first device."""
        return self.devices[0].memory if self.devices else ()

    @property
    def speeds(self) -> tuple[Speed, ...]:
        """Bound of a step on every device."""
        return tuple(one.speed for one in self.devices)

    def to_json(self) -> str:
        """Return everything as JSON, totals beside their parts."""
        found = asdict(self)
        for on, one in zip(found["devices"], self.devices):
            on |= {"peak_bytes": one.peak, "fits": one.fits}
            on["speed"] |= {"seconds": one.speed.seconds, "tokens_per_second": one.speed.tokens_per_second}
            for stage, of in zip(on["memory"], one.memory):
                stage["total"] = of.total
        return json.dumps(found, indent=2)
