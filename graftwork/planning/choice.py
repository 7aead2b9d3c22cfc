"""Choice: the simplest way in which a run fits the devices at hand, where nobody has asked for the fastest.

The fewest ranks share a model, so that the others are replicas that need to say little to each other.
"""

from collections.abc import Iterator
from dataclasses import replace

from graftwork.layout import Layout
from graftwork.planning.advice import POWERS, tensor_sizes
from graftwork.planning.blueprint import world_of_one
from graftwork.planning.checks import Intent, layout_problems
from graftwork.planning.devices import Device
from graftwork.planning.judge import ROOM, Judge

LONG = 8192
"""Rows of more tokens may be cut over context-parallel ranks."""
FREE = 1 / 3
"""Share of a device that the weights of a mixture must leave free: its activations depend on how tokens are routed."""
CHEAP = (None, "selective")
"""Recomputations that cost next to nothing."""


def choose(intent: Intent, of_a_node: int, device: Device) -> Intent | None:
    """Return ``intent`` with the first layout, recomputation and microbatch that fits; None where nothing does.

    Its world and microbatch are the most; ``of_a_node``: how many of the devices stand in one node.
    """
    if intent.blueprint.shape.num_moe_experts is not None:
        return _of_experts(intent, device)
    with world_of_one():
        judge = Judge(intent, device)
        return next((one for one in _settings(intent, of_a_node, device) if judge.fits(one)), None)


def _settings(intent: Intent, of_a_node: int, device: Device) -> Iterator[Intent]:
    """Yield what may fit, simplest first; every layout, before a layer is computed twice."""
    layouts = sorted(_layouts(intent, of_a_node), key=_simplicity)
    most = intent.workload.micro_batch_size
    for recomputes in (CHEAP, ("full",)):
        for layout in layouts:
            if _weights(intent, layout) > ROOM * device.memory:
                continue
            for recompute in recomputes:
                blueprint = replace(intent.blueprint, recompute=recompute)
                for micro in (n for n in reversed(POWERS) if n <= most):
                    work = replace(intent.workload, micro_batch_size=micro)
                    found = replace(intent, blueprint=blueprint, layout=layout, workload=work)
                    if not layout_problems(found):
                        yield found


def _layouts(intent: Intent, of_a_node: int) -> Iterator[Layout]:
    shape, work = intent.blueprint.shape, intent.workload
    whole = shape.undivided
    for tensor in tensor_sizes(intent, intent.world, of_a_node):
        for pipeline in (1,) if whole else POWERS:
            for context in (1,) if whole or work.seq_length <= LONG else POWERS[:4]:
                layout = Layout(tensor, pipeline, context_parallel_size=context, sequence_parallel=tensor > 1)
                if intent.world % layout.model_ranks == 0 and work.seq_length % layout.pad_to_multiple == 0:
                    yield layout


def _simplicity(layout: Layout) -> tuple[int, int, int]:
    return layout.model_ranks, layout.pipeline_model_parallel_size, layout.tensor_model_parallel_size


def _weights(intent: Intent, layout: Layout) -> float:
    """Return the least bytes of the base on a rank."""
    ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    return intent.blueprint.shape.total_parameters() * intent.blueprint.width / ranks


def _of_experts(intent: Intent, device: Device) -> Intent | None:
    """Spread the experts until the weights leave a third free; one row at a time, attention computed twice."""
    shape = intent.blueprint.shape
    gates = 3 if shape.gated else 2
    experts = (shape.num_moe_experts or 0) * shape.mixtures * gates * shape.hidden_size * shape.expert_width
    blueprint = replace(intent.blueprint, recompute="selective")
    for ranks in (n for n in POWERS if intent.world % n == 0):
        found = replace(
            intent,
            blueprint=blueprint,
            layout=Layout(expert_model_parallel_size=ranks),
            workload=replace(intent.workload, micro_batch_size=1),
        )
        held = blueprint.width * (shape.total_parameters() - experts + experts / ranks)
        if held <= (1 - FREE) * device.memory and not layout_problems(found):
            return found
    return None
