"""The shortest time that a step can take: arithmetic, weights read, and messages that nothing hides."""

from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.planning.flops import Flops, GraphFlops
from graftwork.planning.memory import GRADIENT, Setting
from graftwork.planning.parameters import Held
from graftwork.planning.stages import Stage

DEVICES_OF_A_NODE = 8


@dataclass(frozen=True)
class Speed:
    """Seconds of a step at the least, by what takes them, and the tokens a second that this allows.

    ``bubble``: of it, the time in which stages of the pipeline wait for each other.
    """

    device: str
    compute: float
    communication: float
    bubble: float
    tokens: int

    @property
    def seconds(self) -> float:
        """Lower bound of a step."""
        return self.compute + self.communication

    @property
    def tokens_per_second(self) -> float:
        """Upper bound of the throughput."""
        return self.tokens / self.seconds


def speed(stages: Sequence[Stage], flops: GraphFlops, setting: Setting, dtype: str) -> Speed:
    """Return the bound of a step; arithmetic at the device's published (measured) peak."""
    layout, count = setting.layout, setting.microbatches
    ranks = layout.tensor_model_parallel_size * layout.context_parallel_size
    slowest = max(_microbatch(stage, flops, setting, dtype, ranks) for stage in stages)
    waits = (layout.pipeline_model_parallel_size - 1) / (layout.virtual_pipeline_model_parallel_size or 1)
    layers = max(len(stage.layers) for stage in stages)
    between = count * layers * _layer_messages(setting, flops)
    return Speed(
        device=setting.device.name,
        compute=(count + waits) * slowest,
        communication=between + _gradient_sum(stages, setting),
        bubble=waits * slowest,
        tokens=setting.workload.global_batch_size * setting.workload.row_tokens,
    )


def _microbatch(stage: Stage, flops: GraphFlops, setting: Setting, dtype: str, ranks: int) -> float:
    """Seconds of one microbatch on a stage: its FLOPs, or reading its weights if that takes longer."""
    work = Flops()
    for kind, one in flops.layers.items():
        work += one.times(sum(part == kind.part and index in kind.layers for part, index in stage.layers))
    if stage.last:
        work += flops.outside
    read = sum(one.elements(setting.layout) * one.width for one in stage.parameters)
    passes = 3 if work.again > work.attention else 2
    return max(work.total / ranks / setting.device.flops[dtype], passes * read / setting.device.bandwidth)


def _layer_messages(setting: Setting, flops: GraphFlops) -> float:
    """Seconds of one layer's messages: two sums forward and two backward, keys and values of other ranks."""
    layout, shape, device, seconds = setting.layout, setting.shape, setting.device, 0.0
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    passes = 3 if flops.whole.again > flops.whole.attention else 2
    link = device.link if tensor * context <= DEVICES_OF_A_NODE else device.network
    if tensor > 1:
        seconds += 2 * passes * 2 * (tensor - 1) / tensor * setting.hidden_bytes / link
    if context > 1:
        tokens = setting.workload.micro_batch_size * setting.workload.seq_length
        heads = 2 * tokens * shape.groups * shape.channels / tensor * setting.width
        seconds += passes * (context - 1) / context * heads / link
    return seconds


def _gradient_sum(stages: Sequence[Stage], setting: Setting) -> float:
    replicas = setting.replicas * setting.layout.context_parallel_size
    if replicas == 1:
        return 0.0
    within = replicas * setting.layout.model_ranks <= DEVICES_OF_A_NODE
    link = setting.device.link if within else setting.device.network
    largest = max(sum(_sent(p, setting) for p in stage.parameters if p.trains) for stage in stages)
    return (replicas - 1) / replicas * largest / link


def _sent(parameter: Held, setting: Setting) -> float:
    """Bytes of a sum, there and back; of a shared optimizer gradients go there and parameters come back."""
    back = parameter.width if setting.shards > 1 else GRADIENT
    return parameter.elements(setting.layout) * (GRADIENT + back)
