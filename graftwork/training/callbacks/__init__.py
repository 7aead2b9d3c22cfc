"""Lightning callbacks of a fine-tuning run: what watches it, writes it down and saves it.

None of them changes what is trained or how; that is the strategy's and the update's part.
"""

from graftwork.endings import RESUMABLE_EXIT_CODE, Interrupted
from graftwork.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from graftwork.training.callbacks.banner import Banner
from graftwork.training.callbacks.early_stop import EarlyStop
from graftwork.training.callbacks.metrics import BeforeAfter
from graftwork.training.callbacks.progress import Progress
from graftwork.training.callbacks.report import Report
from graftwork.training.callbacks.room import Room
from graftwork.training.callbacks.samples import Samples
from graftwork.training.callbacks.self_check import SelfCheck
from graftwork.training.callbacks.throughput import Throughput
from graftwork.training.callbacks.training_state import TrainingState

__all__ = [
    "RESUMABLE_EXIT_CODE",
    "AdapterCheckpoint",
    "Banner",
    "BeforeAfter",
    "EarlyStop",
    "Interrupted",
    "Progress",
    "Report",
    "Room",
    "Samples",
    "SelfCheck",
    "Throughput",
    "TrainingState",
]
