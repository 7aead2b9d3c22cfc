"""What Lightning keeps of a run, for tests that write training states without one."""

from pathlib import Path
from typing import Any

import torch

_WRITTEN = Path(__file__).parents[1] / "written_before" / "adapters" / "checkpoints" / "step-00000003" / "trainer.pt"


def lightning_state(step: int) -> dict[str, Any]:
    """Return the checkpoint of a real run as if it had made ``step`` steps."""
    found: dict[str, Any] = torch.load(_WRITTEN, weights_only=True)
    made = found["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    made["total"] = {"ready": step, "completed": step}
    return {**found, "global_step": step}
