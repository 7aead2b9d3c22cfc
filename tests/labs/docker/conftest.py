"""A real Docker daemon, the image of the repository's Dockerfile, and what a training in a container reads."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny_recipe import make_place
from tests.labs.docker.base_image import LABEL, base_image

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
IMAGE = "graftwork-lab:cpu"
UP_SECONDS, BUILD_SECONDS = 400, 900
NO_DAEMON = 3


def docker(*arguments: str, timeout: float = 120) -> str:
    """Return what Docker's client prints; docker.io's own, where there are two: another may lack the builder."""
    environment = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}", "DOCKER_BUILDKIT": "1"}
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def docker_daemon() -> Iterator[None]:
    """A daemon that answers; one that was started for this session ends with it."""
    script = str(HERE / "docker_up.sh")
    up = subprocess.run([script, "up"], capture_output=True, text=True, timeout=UP_SECONDS)
    if up.returncode == NO_DAEMON:
        pytest.skip(f"no container is run here: {up.stderr.strip()}")
    assert up.returncode == 0, up.stderr
    yield
    if up.stdout.strip() == "started":
        subprocess.run([script, "down"], check=True, timeout=60)


@pytest.fixture(scope="session")
def docker_lab(docker_daemon: None) -> str:
    """The name of the CPU image, built from the Dockerfile on a base that holds this machine's packages."""
    build = ["build", "--target", "cpu", "--build-arg", f"CPU_BASE={base_image()}", "--network", "host"]
    docker(*build, "--label", f"{LABEL}=1", "--tag", IMAGE, str(ROOT), timeout=BUILD_SECONDS)
    docker("image", "prune", "--force", "--filter", f"label={LABEL}")
    return IMAGE


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint with its tokenizer, and a training file, in one directory to mount."""
    root = make_place(tmp_path_factory.mktemp("inputs"))
    for path in (root, *root.rglob("*")):  # other users read them too
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root
