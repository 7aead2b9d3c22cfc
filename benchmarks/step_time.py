"""Ratio benchmark against transformers + peft, and TRL where it is installed: same process, rounds of both, medians.

All sides have the same random checkpoint and the same rows.

    python benchmarks/step_time.py            # writes benchmarks/results/cpu.json and the tables of docs/benchmarks.md
    python benchmarks/step_time.py --model smollm2 --cases lora_fp32 --output FILE   # the shape of SmolLM2-135M
    python benchmarks/step_time.py --quick    # a toy size that only shows that everything runs

Only a whole run is recorded; with --quick, --cases or --output the figures go to a file of their own.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import measure
import table
import torch
from workload import CASES, FULL, PROMPTS, QUICK, SMOLLM2, Batch, Case, Size, by_name, make_checkpoint

RESULTS = Path(__file__).with_name("results")
SIZES = {"small": FULL, "smollm2": SMOLLM2}
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""Relative difference of the first loss; measured: 6e-9 and 3e-8."""


def main() -> None:
    """Read the command line and measure."""
    options = arguments()
    size = QUICK if options.quick else SIZES[options.model]
    if options.child:
        side, case, checkpoint = options.child
        return child(side, by_name(case), Path(checkpoint), size)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRAFTWORK_CACHE"] = f"{folder}/cache"  # fingerprints of a throw-away model stay out of the user's
        results = run(size, options, Path(folder))
    record = not (options.quick or options.output or options.cases) and options.model == "small"
    output = RESULTS / "cpu.json" if record else Path(options.output or "bench.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    if record:
        table.write(results)
    print(table.markdown(results))


def arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, one thread, two rounds")
    parser.add_argument("--model", choices=SIZES, default="small", help="default: small, of 30M parameters")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and 2; 1 with --quick")
    parser.add_argument("--rounds", type=int, help="default: 12, a third for the mix; 2 with --quick")
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], help="default: all")
    parser.add_argument("--output", help="another file than benchmarks/results/cpu.json, and no page")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.threads = options.threads or ([1] if options.quick else [1, 2])
    options.rounds = options.rounds or (2 if options.quick else 12)
    return options


def run(size: Size, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything and return plain data."""
    facts = measure.machine()
    checkpoint = make_checkpoint(size, folder / "base")
    cases, left_out = chosen_cases(options.cases, facts["bf16_in_hardware"], measure.TRL)
    memory = {
        case.name: {side: measure.peak_memory(side, case.name, checkpoint, options) for side in ("ours", "peer")}
        for case in cases
    }
    return {
        "machine": facts,
        "model": size.model,
        "rounds": options.rounds,
        "left_out": left_out,
        "steps": [row for case in cases for row in steps(case, size, checkpoint, options)],
        "files": files(checkpoint, size, options.rounds, folder) if options.model == "small" else [],
        "trainer": trainer(checkpoint, size, options) if options.model == "small" else None,
        "memory": memory,
    }


def chosen_cases(
    names: list[str] | None, bf16_in_hardware: bool, trl_installed: bool
) -> tuple[list[Case], dict[str, str]]:
    """Return (what is measured, title of what is left out: why).

    Unasked there is no bf16 where it is emulated, a hundred times slower.
    """
    wanted = [case for case in CASES if names is None or case.name in names]
    left_out = {case.title: "TRL is not installed" for case in wanted if case.trl and not trl_installed}
    if names is None and not bf16_in_hardware:
        left_out |= {case.title: "this processor only emulates bf16" for case in wanted if case.dtype == "bf16"}
    return [case for case in wanted if case.title not in left_out], left_out


def steps(case: Case, size: Size, checkpoint: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time whole steps of one case, both sides in turns, for each number of threads."""
    batch = case.batch(size)
    ours, peer = (contestant(side, case)(checkpoint, case, batch) for side in ("ours", "peer"))
    first = {"ours": ours.step(), "peer": peer.step()}
    if case.adapters not in PROMPTS:
        check_same_loss(case, **first)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        rounds = options.rounds if case.data == "dense" else max(2, options.rounds // 3)
        times = measure.interleaved({"ours": ours.step, "peer": peer.step}, rounds)
        low, ratio, high = measure.quartiles(**times)
        seconds = {side: statistics.median(found) for side, found in times.items()}
        row = {
            "case": case.name,
            "title": case.title,
            "threads": threads,
            "tokens": batch.real_tokens,
            "ours_seconds": seconds["ours"],
            "peer_seconds": seconds["peer"],
            "ours_tokens_per_second": batch.real_tokens / seconds["ours"],
            "peer_tokens_per_second": batch.real_tokens / seconds["peer"],
            "ratio": ratio,
            "half_of_the_ratios": [low, high],
            "rounds": rounds,
            "ours_trainable": ours.trainable,
            "peer_trainable": peer.trainable,
            "losses": {"first": first, "last": {"ours": ours.step(), "peer": peer.step()}},
        }
        print(f"{case.name}, {threads} thread(s): {row['ratio']:.2f} x the peer", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def contestant(side: str, case: Case) -> Callable[[Path, Case, Batch], Any]:
    """Return what builds a side of a case; each is imported when it is measured."""
    if side == "ours":
        from ours import Ours

        return Ours
    if case.trl:
        from trl_peer import TRL

        return TRL
    from peer import Peer

    return Peer


def check_same_loss(case: Case, ours: float, peer: float) -> None:
    """Both sides start from the same function: another loss would mean that they do not do the same work."""
    if abs(ours - peer) > TOLERANCE[case.dtype] * abs(peer):
        raise SystemExit(f"{case.name}: the first loss is {ours} here and {peer} at the peer; nothing was compared.")


def files(checkpoint: Path, size: Size, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Time loading the base and saving and loading an adapter."""
    import ours
    import peer

    torch.set_num_threads(1)
    case = by_name("lora_fp32")
    mine, theirs = (side(checkpoint, case, case.batch(size)) for side in (ours.Ours, peer.Peer))
    places = {"ours": folder / "adapter_ours", "peer": folder / "adapter_peer"}
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "load the base checkpoint": (lambda: ours.load(checkpoint), lambda: peer.load(checkpoint)),
        "save the adapter": (lambda: mine.save(places["ours"]), lambda: theirs.save(places["peer"])),
        "load the adapter": (lambda: mine.restore(places["ours"]), lambda: theirs.restore(places["peer"])),
    }
    found = []
    for title, (first, second) in pairs.items():
        first(), second()
        times = measure.interleaved({"ours": first, "peer": second}, rounds)
        found.append({"title": title, **{f"{side}_seconds": statistics.median(t) for side, t in times.items()}})
    return found


def trainer(checkpoint: Path, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Time the same step in a bare loop and through ``trainer.fit``, in turns."""
    import ours

    torch.set_num_threads(1)
    case = by_name("lora_fp32")
    batch = case.batch(size)
    loop, fit = float("inf"), float("inf")
    for _ in range(1 if options.quick else 3):
        bare = ours.Ours(checkpoint, case, batch)
        loop = min(loop, min(measure.interleaved({"loop": bare.step}, options.rounds)["loop"]))
        fit = min(fit, ours.through_the_trainer(checkpoint, case, batch, options.rounds + 1))
    return {"title": case.title, "loop_seconds": loop, "trainer_seconds": fit}


def child(side: str, case: Case, checkpoint: Path, size: Size) -> None:
    """Print MB after the imports, with the model built, and at the peak of three steps."""
    torch.set_num_threads(1)
    made = contestant(side, case)
    imports = measure.resident_mb()
    one = made(checkpoint, case, case.batch(size))
    ready = measure.resident_mb()
    for _ in range(3):
        one.step()
    print(imports, ready, measure.resident_mb())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
