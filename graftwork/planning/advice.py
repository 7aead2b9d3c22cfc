"""Advice: the layouts, recomputation and microbatches with which a run fits so many devices, fastest first."""

from collections.abc import Iterator
from dataclasses import replace

from graftwork.errors import ConfigError, quoted
from graftwork.layout import Layout, valid_tensor_sizes
from graftwork.models.recompute import RECOMPUTE
from graftwork.planning import show
from graftwork.planning.blueprint import world_of_one
from graftwork.planning.checks import Intent, layout_problems
from graftwork.planning.devices import Device, device_named
from graftwork.planning.judge import Candidate, Judge
from graftwork.planning.speed import DEVICES_OF_A_NODE

POWERS = tuple(2**n for n in range(8))


def parse_fit(text: str) -> tuple[int, Device]:
    """Return number and kind of ``8xH100``; raises ConfigError for anything else."""
    count, _, name = text.partition("x")
    if not count.isdigit() or int(count) == 0 or not name:
        raise ConfigError(f"--fit {quoted(text)} is no number of devices; write for example 8xH100.")
    return int(count), device_named(name)


def advise(intent: Intent, world: int, device: Device) -> list[Candidate]:
    """Return what fits ``world`` devices, fastest first by the bound of a step; of equals the one that keeps most room.

    Raises ConfigError for a mixture of experts.
    """
    if intent.blueprint.shape.num_moe_experts is not None:
        raise ConfigError("a mixture of experts cannot be fitted: its activations depend on how tokens are routed.")
    with world_of_one():
        judge = Judge(intent, device)
        found = [judge.judged(one) for one in _settings(intent, world) if judge.fits(one)]
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


def tensor_sizes(intent: Intent, world: int, of_a_node: int = DEVICES_OF_A_NODE) -> list[int]:
    """Return the tensor-parallel sizes that suit the model and divide ``world``, within a node."""
    valid = valid_tensor_sizes(intent.blueprint.shape)
    return [n for n in valid if world % n == 0 and n <= of_a_node]


def _settings(intent: Intent, world: int) -> Iterator[Intent]:
    """Yield every recomputation, layout and microbatch that the rules of a layout allow."""
    for tensor in tensor_sizes(intent, world):
        layout = Layout(tensor, sequence_parallel=tensor > 1)
        for recompute in (None, *RECOMPUTE):
            blueprint = replace(intent.blueprint, recompute=recompute)
            yield from _divisions(replace(intent, blueprint=blueprint, layout=layout), world)


def _divisions(intent: Intent, world: int) -> Iterator[Intent]:
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
