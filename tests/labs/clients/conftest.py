"""Other people's programs in an environment of their own: lm-eval as a command, and keepers of a run's figures."""

import os
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
REQUIREMENTS, LOGGERS = HERE / "requirements.txt", HERE / "loggers-requirements.txt"
INSTALL_SECONDS, RUN_SECONDS = 300, 180

OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What tests of several ranks leave behind, and lm-eval would take for its own."""

Run = Callable[..., None]


def installed(requirements: Path, *options: str) -> Path:
    """Return the directory that holds ``requirements``; made once for each list of them and interpreter."""
    digest = sha256(requirements.read_bytes()).hexdigest()[:12]
    place = Path(sys.prefix) / f"clients-{digest}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", *options]
    with FileLock(f"{place}.lock", timeout=INSTALL_SECONDS):
        if not (place / ".complete").is_file():
            done = subprocess.run(
                [*pip, "--target", str(place), "--upgrade", "--requirement", str(requirements)],
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
            )
            if done.returncode:
                pytest.skip(f"{requirements.name} cannot be installed here: {done.stderr.strip()[-300:]}")
            (place / ".complete").touch()
    return place


@pytest.fixture(scope="session")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What runs lm-eval's command line, without a network."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in OF_RANKS},
        "PYTHONPATH": str(installed(REQUIREMENTS, "--no-deps")),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }

    def run(**options: str) -> None:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--log_samples"]
        command += [word for name, value in options.items() for word in (f"--{name}", value)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=RUN_SECONDS)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.fixture(scope="session")
def loggers() -> Path:
    """The directory that holds wandb and mlflow with what they need."""
    return installed(LOGGERS)
