"""Shared by all tests: a private NeMo Run home and quiet CPU threads, in this process and in every child."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Read when nemo_run is imported, so it is set before any test module is.
os.environ["NEMORUN_HOME"] = tempfile.mkdtemp(prefix="graftwork-nemorun-")
