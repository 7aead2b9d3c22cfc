"""A plan as text: short tables, in units that people read."""

from collections import Counter
from collections.abc import Iterable, Sequence

from graftwork.peft.report import SiteReport
from graftwork.planning.figures import Figures

_COLUMNS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "buffers", "runtime", "total")
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def as_text(plan: Figures) -> str:
    """Return the whole plan."""
    parts = [_head(plan), _methods(plan.sites), _memory(plan), _speed(plan), _findings(plan), _problems(plan)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def size(count: float) -> str:
    """Return a number of bytes with three digits and a decimal unit."""
    for unit, one in _UNITS:
        if count >= one:
            return f"{count / one:.3g} {unit}" if count < 999.5 * one else f"{count / one:,.0f} {unit}"
    return f"{count:.0f} B"


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows with aligned columns: the first to the left, all others to the right."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def _head(plan: Figures) -> list[str]:
    share = 100 * plan.trainable_parameters / max(1, plan.total_parameters)
    layout = plan.layout
    sizes = {
        "tensor": layout.tensor_model_parallel_size,
        "pipeline": layout.pipeline_model_parallel_size,
        "context": layout.context_parallel_size,
        "expert": layout.expert_model_parallel_size,
    }
    cut = " x ".join(f"{name} {count}" for name, count in sizes.items() if count > 1) or "no model parallelism"
    replicas = plan.world // layout.model_ranks
    lines = [
        plan.name,
        f"trains {plan.trainable_parameters:,} of {plan.total_parameters:,} parameters ({share:.3g} %), "
        f"writes {size(plan.artifact_bytes)}",
        f"{plan.world} device(s): {cut}, {replicas} replica(s)",
    ]
    return [line for line in lines if line]


def _methods(sites: Sequence[SiteReport]) -> list[str]:
    """One line for each adapter and name of a site: how often it stands there."""
    if not sites:
        return ["full fine-tuning: every parameter of the base trains"]
    count: Counter[tuple[str, str, str]] = Counter()
    trained: Counter[tuple[str, str, str]] = Counter()
    for site in sites:
        key = site.adapter, site.method, site.site.rpartition(".")[2]
        count[key] += 1
        trained[key] += site.parameters
    head = ("adapter", "method", "at", "sites", "parameters")
    return table([head, *((*key, f"{count[key]:,}", f"{trained[key]:,}") for key in count)])


def _memory(plan: Figures) -> list[str]:
    if not plan.devices:
        return []
    stages = plan.memory_per_rank
    rows = [[f"{stage.stage}", *(size(getattr(stage, name)) for name in _COLUMNS)] for stage in stages]
    return [
        f"memory of a rank, by pipeline stage ({plan.devices[0].device.name})",
        *table([("stage", *_COLUMNS), *rows]),
    ]


def _speed(plan: Figures) -> list[str]:
    if plan.flops is None or not plan.devices:
        return []
    one = plan.flops
    parts = {"forward": one.forward, "data gradients": one.data, "weight gradients": one.weights, "again": one.again}
    said = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in parts.items() if value)
    head = ("device", "peak", "of", "fits", "step at least", "tokens/s at most", "waiting")
    rows = [
        (
            on.device.name, size(on.peak), size(on.device.memory), "yes" if on.fits else "no",
            f"{on.speed.seconds:.3g} s", f"{on.speed.tokens_per_second:,.0f}",
            f"{100 * on.speed.bubble / on.speed.seconds:.0f} %",
        )
        for on in plan.devices
    ]  # fmt: skip
    return [f"{one.total / 1e9:.4g} GFLOP a token: {said}", *table([head, *rows])]


def _findings(plan: Figures) -> list[str]:
    lines = []
    if plan.base is not None and plan.base.name is not None:
        lines.append(f"base {plan.base.name}: {', '.join(plan.base.notes) or plan.base.directory or 'not usable'}")
    if plan.rows is not None:
        for split in plan.rows.splits:
            found, more = split.lengths, "" if split.whole else " looked at"
            told = f"; {found.median} tokens in the middle, {found.longest} at most" if found else ""
            lines.append(f"{split.name}: {split.rows:,} rows{more}{told}")
        lines += plan.rows.notes
    return lines


def _problems(plan: Figures) -> list[str]:
    if not plan.problems:
        return ["no problems found"]
    return [f"{len(plan.problems)} problem(s):", *(f"- {problem}" for problem in plan.problems)]
