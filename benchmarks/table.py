"""The measured figures as Markdown, between two markers of docs/benchmarks.md."""

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: written by `make bench` -->", "<!-- end of figures -->"


def write(results: dict[str, Any], page: Path = PAGE) -> None:
    """Write the tables of step times into the page."""
    replace(markdown(results), BEGIN, END, page)


def replace(text: str, begin: str, end: str, page: Path = PAGE) -> None:
    """Replace what stands between two markers of the page."""
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def markdown(results: dict[str, Any]) -> str:
    """Return the machine and all tables."""
    parts = [_machine(results["machine"]), _steps(results), _left_out(results), _times(results), _overhead(results)]
    return "\n\n".join(part for part in parts if part)


def _machine(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {facts[k]}" for k in ("torch", "megatron-core", "lightning", "transformers", "peft"))
    bf16 = "with" if facts["bf16_in_hardware"] else "without"
    return (
        f"{facts['processor']}, {facts['cores']} cores, {bf16} bf16 instructions; load at the start "
        f"{facts['load_at_start']}. Python {facts['python']}, {versions}."
    )


def _steps(results: dict[str, Any]) -> str:
    lines = [
        "| step | threads | graftwork, tokens/s | peer, tokens/s | ratio | trained parameters | added by steps "
        "| loss, first to last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["steps"]:
        memory = results["memory"][row["case"]]
        lines.append(
            f"| {row['title']} | {row['threads']} | {row['ours_tokens_per_second']:,.0f} "
            f"| {row['peer_tokens_per_second']:,.0f} | {_ratio(row)} "
            f"| {row['ours_trainable']:,} / {row['peer_trainable']:,} "
            f"| {_added(memory['ours']):,.0f} / {_added(memory['peer']):,.0f} MB | {_losses(row['losses'])} |"
        )
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["half_of_the_ratios"]
    return f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})"


def _added(memory: dict[str, float]) -> float:
    """Return MB that steps add to the peak of building the model."""
    return memory["peak_mb"] - memory["ready_mb"]


def _losses(losses: dict[str, dict[str, float]]) -> str:
    return " / ".join(f"{losses['first'][side]:.4f} to {losses['last'][side]:.4f}" for side in ("ours", "peer"))


def _left_out(results: dict[str, Any]) -> str:
    return "\n".join(f"Not measured, since {why}: {title}." for title, why in results["left_out"].items())


def _times(results: dict[str, Any]) -> str:
    if not results["files"]:
        return ""
    lines = ["| files | graftwork, ms | peer, ms | ratio |", "|---|---|---|---|"]
    for row in results["files"]:
        ours, peer = 1000 * row["ours_seconds"], 1000 * row["peer_seconds"]
        lines.append(f"| {row['title']} | {ours:,.1f} | {peer:,.1f} | **{peer / ours:.2f}** |")
    return "\n".join(lines)


def _overhead(results: dict[str, Any]) -> str:
    found = results["trainer"]
    if found is None:
        return ""
    share = 100 * (found["trainer_seconds"] / found["loop_seconds"] - 1)
    return (
        f"`trainer.fit` with `MegatronStrategy` against a bare loop over the same model and batch ({found['title']}): "
        f"{1000 * found['trainer_seconds']:,.1f} ms against {1000 * found['loop_seconds']:,.1f} ms a step "
        f"({share:+.1f} %)."
    )
