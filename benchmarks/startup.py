"""What graftwork adds to a start: CPU time as a ratio to a bare NeMo Run, interleaved, medians.

    python benchmarks/startup.py            # writes benchmarks/results/startup.json and the table of docs/benchmarks.md
    python benchmarks/startup.py --rounds 3 --output startup.json

CPU time (user and system) of the whole process is compared: seconds on the wall belong to whatever else runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import table

RESULT = Path(__file__).with_name("results") / "startup.json"
BEGIN, END = "<!-- startup: written by `make bench` -->", "<!-- end of startup -->"

NEMORUN = str(Path(sys.executable).with_name("nemorun"))
FINETUNE = [NEMORUN, "graft", "finetune", "--factory", "smollm2_135m", "data.train=train.jsonl", "--dryrun"]
COMMANDS = {
    "`import nemo_run`": [sys.executable, "-c", "import nemo_run"],
    "`from graftwork import recipes`": [sys.executable, "-c", "from graftwork import recipes"],
    "`nemorun --help`": [NEMORUN, "--help"],
    "`nemorun graft --help`": [NEMORUN, "graft", "--help"],
    "a dry run of one recipe": FINETUNE,
}
COMPARED = {
    "`from graftwork import recipes`": ("`import nemo_run`", 1.2),
    "`nemorun graft --help`": ("`nemorun --help`", 1.2),
    "a dry run of one recipe": ("`nemorun --help`", 1.9),
}
"""What is compared with what, and the ratio that it should not exceed."""


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each command is started; default: 7")
    parser.add_argument("--output", help="another file than benchmarks/results/startup.json, and no page")
    options = parser.parse_args()
    seconds = measure(options.rounds)
    results = {"rounds": options.rounds, "cpu_seconds": seconds, "ratios": ratios(seconds)}
    output = Path(options.output) if options.output else RESULT
    output.write_text(json.dumps(results, indent=2) + "\n")
    if not options.output:
        table.replace(markdown(results), BEGIN, END)
    print(markdown(results))


def measure(rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of every command; one round warms the files up and is left out."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, command in COMMANDS.items():
            found[name].append(cpu_seconds(command))
    return {name: round(statistics.median(values[1:]), 3) for name, values in found.items()}


def cpu_seconds(command: list[str]) -> float:
    """Run a command; return the user and system time of its process."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} exits with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Return how many times the CPU time of the bare command each start takes."""
    return {name: round(seconds[name] / seconds[bare], 2) for name, (bare, _) in COMPARED.items()}


def markdown(results: dict[str, dict[str, float]]) -> str:
    """Return the table."""
    lines = ["| start | CPU seconds | bare NeMo Run | ratio | at most |", "|---|---|---|---|---|"]
    for name, (bare, most) in COMPARED.items():
        own, other = results["cpu_seconds"][name], results["cpu_seconds"][bare]
        lines.append(f"| {name} | {own:.2f} | {bare}, {other:.2f} | **{results['ratios'][name]:.2f}** | {most} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
