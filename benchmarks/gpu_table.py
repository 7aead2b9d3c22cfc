"""The figures of a device as Markdown, between two markers of docs/performance.md."""

from pathlib import Path
from typing import Any

from gpu_speed import ANCHORS
from table import replace

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- gpu: written by `make gpu` -->", "<!-- end of gpu -->"


def write(results: dict[str, Any], page: Path = PAGE) -> None:
    """Write the figures into the page."""
    replace(markdown(results), BEGIN, END, page)


def markdown(results: dict[str, Any]) -> str:
    """Return the machine, the parity and the speed."""
    return "\n\n".join(
        part for part in (_machine(results), _parity(results), _others(results), _speed(results)) if part
    )


def _machine(results: dict[str, Any]) -> str:
    facts = results["machine"]
    cuda = f", CUDA {facts['cuda']}" if facts["cuda"] else ""
    versions = f"torch {facts['torch']}, megatron-core {facts['megatron-core']}"
    return f"{facts['device']}{cuda}; {versions}; layers of {facts['layers']}."


def _parity(results: dict[str, Any]) -> str:
    lines = ["| fp32 beside the CPU | logits | losses of three steps | gradients | |", "|---|---|---|---|---|"]
    for row in results["parity"]:
        said = "equal" if row["ok"] else "**wrong**"
        lines.append(f"| {row['case']} | {row['logits']:.1e} | {row['loss']:.1e} | {row['gradient']:.1e} | {said} |")
    return "\n".join(lines)


def _others(results: dict[str, Any]) -> str:
    curve, resumed = results["bf16"], results["resumed"]
    kernels = "; ".join(
        f"{rows} rows: {', '.join(names) or 'none seen'}" for rows, names in results["attention"].items()
    )
    return "\n".join(
        [
            f"* bf16: {len(curve['bf16'])} losses within {100 * curve['furthest']:.1f} % of fp32's"
            f"{'' if curve['ok'] else ': **too far**'}.",
            f"* A CPU's run, {resumed['case']}: trained values within {resumed['furthest']:.1e}"
            f"{'' if resumed['ok'] else ': **too far**'}.",
            f"* Attention ran {kernels}.",
        ]
    )


def _speed(results: dict[str, Any]) -> str:
    if not results["speed"]:
        return ""
    lines = [
        "| model | | microbatch x tokens | recompute | layers | tokens/s | MFU | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["speed"]:
        head = (
            f"| {row['model']} | {row['side']} | {row['micro_batch']} x {row['length']} | {row['recompute'] or 'none'} "
        )
        head += f"| {row['layers']} |"
        if "left_out" in row:
            lines.append(f"{head} {row['left_out']} | | |")
            continue
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %"
        memory = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f} GB"
        lines.append(f"{head} {row['tokens_per_second']:,.0f} | {mfu} | {memory} |")
    known = [
        f"{name} {speed:,}" for name, speed in ANCHORS.items() if any(r["model"] == name for r in results["speed"])
    ]
    published = f"\n\nPublished for one H100 (NeMo Automodel), tokens/s: {', '.join(known)}." if known else ""
    return "\n".join(lines) + published
