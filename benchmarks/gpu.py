"""Is a GPU right, and how fast? Parity with the CPU for every method, then LoRA steps of published sizes.

    python benchmarks/gpu.py               # on a GPU: parity and speed, docs/performance.md
    python benchmarks/gpu.py --parity      # the parity alone, on whatever device is here

Needs torch, megatron-core and what graftwork's models import; no NeMo Run and no network. Ends within --minutes.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "gpu.json"
sys.path.insert(0, str(ROOT))  # it runs from a checkout that is not installed
REFERENCE_SECONDS = 240


def main() -> None:
    """Read the command line, compare, measure, write; exit code 1 where a device is wrong."""
    options = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.reference:
        return write_reference(Path(options.reference))
    started = time.monotonic()
    results = run(started + 60 * options.minutes, options.parity, options.toy)
    results["seconds"] = round(time.monotonic() - started, 1)
    output = Path(options.output) if options.output else RESULTS
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    import gpu_table

    if output == RESULTS and results["machine"]["device"] != "cpu":
        gpu_table.write(results)
    print(gpu_table.markdown(results))
    if not results["ok"]:
        raise SystemExit(1)


def arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parity", action="store_true", help="no speed; the default where there is no GPU")
    parser.add_argument("--toy", action="store_true", help="toy sizes that only show that the speed part runs")
    parser.add_argument("--minutes", type=float, default=9.0, help="no cell begins that might end later; default 9")
    parser.add_argument("--output", help=f"default: {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_reference(folder: Path) -> None:
    """Write what the CPU makes of every case."""
    import gpu_parity
    import gpu_resume

    gpu_parity.write_reference(folder)
    gpu_resume.write_reference(folder)


def run(deadline: float, parity_only: bool, toy: bool) -> dict[str, Any]:
    """Compare and measure; return plain data."""
    import gpu_parity
    import gpu_resume
    import gpu_speed
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["GRAFTWORK_CACHE"] = f"{folder}/cache"
        child = gpu_parity.reference_process(folder, Path(__file__))
        _, said = child.communicate(timeout=REFERENCE_SECONDS)
        if child.returncode:
            raise SystemExit(f"the reference on the CPU failed:\n{said[-2000:]}")
        rows = list(gpu_parity.compare(folder))
        curve = gpu_parity.bf16_curve(folder)
        resumed = gpu_resume.go_on(folder)
        kernels = gpu_parity.attention_kernels(folder)
    speed = []
    if toy or (torch.cuda.is_available() and not parity_only):
        sizes, length = (gpu_speed.TOY, 32) if toy else (gpu_speed.SIZES, 4096)
        speed = list(gpu_speed.measure(sizes, length, deadline))
    return {
        "machine": _machine(),
        "command": " ".join(["python", *sys.argv]),
        "ok": all(row["ok"] for row in [*rows, curve, resumed]),
        "parity": rows,
        "bf16": curve,
        "resumed": resumed,
        "attention": kernels,
        "speed": speed,
    }


def _machine() -> dict[str, Any]:
    import measure
    import torch

    from graftwork.compat import transformer_engine

    here = torch.cuda.is_available()
    return measure.machine() | {
        "device": torch.cuda.get_device_name() if here else "cpu",
        "cuda": torch.version.cuda if here else None,
        "layers": "Transformer Engine" if here and transformer_engine.usable() else "torch",
    }


if __name__ == "__main__":
    main()
