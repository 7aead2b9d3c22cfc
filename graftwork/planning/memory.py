"""Memory of a rank on every pipeline stage, in bytes: what stands there, and what a step adds at its peak."""

from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.layout import Layout
from graftwork.models.shapes import Shape
from graftwork.planning.activations import Activations
from graftwork.planning.devices import Device
from graftwork.planning.stages import Stage
from graftwork.planning.workload import Workload
from graftwork.training.callbacks.room import MASTER, MOMENTS
from graftwork.training.optimizer.bucket import BUCKET_ELEMENTS

GRADIENT = 4
"""Bytes of an element of a gradient: sums are kept in fp32."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage at the peak of a step.

    ``activations``: saved for the backward pass by all microbatches that wait, and a layer's own while it runs;
    ``logits``: of output layer and loss; ``buffers``: for communication; ``step``: what the optimizer's step needs in
    place of these three; ``runtime``: the process itself. ``late``: no gradient is there yet when activations peak.
    """

    stage: int
    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    step: float
    runtime: float
    late: bool = False

    @property
    def total(self) -> float:
        """Bytes at the peak: in the middle of a microbatch or when the optimizer steps."""
        standing = self.weights + self.adapters + self.optimizer + self.runtime
        running = self.activations + self.logits + self.buffers
        if self.late:
            return standing + max(running, self.gradients + self.step)
        return standing + self.gradients + max(running, self.step)


@dataclass(frozen=True)
class Setting:
    """What a rank's memory depends on beside the stage: the layout, the rows, the device.

    ``shards``: ranks that share the optimizer's state out, 1 where each has all of it.
    """

    shape: Shape
    width: int
    layout: Layout
    workload: Workload
    replicas: int
    device: Device
    shards: int = 1

    @property
    def microbatches(self) -> int:
        """Microbatches of a step on each rank."""
        return max(1, self.workload.global_batch_size // (self.workload.micro_batch_size * self.replicas))

    @property
    def hidden_bytes(self) -> float:
        """Bytes of one microbatch's hidden states between two layers, whole along the tensor-parallel ranks."""
        context = self.layout.context_parallel_size
        tokens = self.workload.micro_batch_size * self.workload.length(context) / context
        return tokens * self.shape.hidden_size * self.width


def memory(stages: Sequence[Stage], activations: Activations, setting: Setting) -> list[StageMemory]:
    """Return the memory of every pipeline stage."""
    return [_of(stage, activations, setting) for stage in stages]


def _of(stage: Stage, activations: Activations, setting: Setting) -> StageMemory:
    layout = setting.layout
    sizes = [(one, one.elements(layout)) for one in stage.parameters]
    trained = [(one, size) for one, size in sizes if one.trains]
    elements, largest = sum(size for _, size in trained), max((size for _, size in trained), default=0.0)
    low = any(one.width < MASTER for one, _ in trained)
    saved = activations.of(stage.layers) + (activations.outside if stage.first or stage.last else 0.0)
    return StageMemory(
        stage=stage.index,
        weights=sum(size * one.width for one, size in sizes if not _added(one.inside)),
        adapters=sum(size * one.width for one, size in sizes if _added(one.inside)),
        gradients=elements * GRADIENT,
        optimizer=sum(size * (MOMENTS + (MASTER if one.width < MASTER else 0)) for one, size in trained)
        / setting.shards,
        activations=stage.waiting * saved + activations.transient,
        logits=activations.logits if stage.last else 0.0,
        buffers=_buffers(setting),
        step=_step(setting, elements, largest),
        runtime=setting.device.runtime,
        late=setting.microbatches == 1 and not low,
    )


def _added(inside: str) -> bool:
    """Tell an adapter's own tensors from the base's, which an adapter may train too."""
    return ".adapters." in f".{inside}"


def _step(setting: Setting, elements: float, largest: float) -> float:
    """Roots of the second moments, of all tensors at once or of one after another; before it, a bucket of gradients.

    Of a shared optimizer both are of a share, and the share's summed gradients stand beside them.
    """
    ranks = setting.replicas * setting.layout.context_parallel_size
    bucket = min(elements, BUCKET_ELEMENTS) * GRADIENT if ranks > 1 else 0.0
    share = elements / setting.shards
    summed = share * GRADIENT if setting.shards > 1 else 0.0
    return summed + max(bucket, 4 * share if setting.device.at_once else 2 * 4 * min(share, largest))


def _buffers(setting: Setting) -> float:
    layout, shape, found = setting.layout, setting.shape, 0.0
    part = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    if layout.sequence_parallel:
        found += 2 * setting.hidden_bytes  # the whole sequence in front of a linear, and its gradient
    if layout.context_parallel_size > 1:
        heads = 2 * shape.groups * shape.channels / layout.tensor_model_parallel_size
        tokens = setting.workload.micro_batch_size * setting.workload.length(layout.context_parallel_size)
        found += 2 * tokens * heads * setting.width  # keys and values of all ranks, and their gradients
    if layout.pipeline_model_parallel_size > 1:
        found += 2 * setting.hidden_bytes / part  # what is sent and what is received
    return found
