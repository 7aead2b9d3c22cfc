"""The docker command, word for word, and what a container is given."""

import gc
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork.errors import ConfigError
from graftwork.executors import docker, local
from graftwork.executors.docker import ALL_GPUS, DEVICE
from graftwork.executors.submission.script import script_of
from graftwork.recipes import llama2_7b

# NeMo Run's commands leave their pipes open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAFTWORK_PROFILE", raising=False)
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # NeMo Run's commands read it
    yield
    gc.collect()


def normal(command: str, tmp_path: Path) -> list[str]:
    """Return the lines of a command without what differs from call to call."""
    command = re.sub(r"\d{19}", "NUMBER", command.replace(str(tmp_path), "/HERE"))
    command = re.sub(
        r"(nemo-run/id=\S+-|id.{8}train-)[a-z0-9]+", r"\1ID", re.sub(r"graftwork \d+\.\S+?'", "graftwork V'", command)
    )
    return [line.removesuffix(" \\").strip() for line in command.splitlines()]


def test_the_command_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[docker.__module__], "DEVICE", tmp_path)  # as where there are GPUs
    monkeypatch.setattr("os.getuid", lambda: 1000)
    monkeypatch.setattr("os.getgid", lambda: 100)
    recipe = llama2_7b.finetune_recipe(num_gpus_per_node=2)
    (tmp_path / "train.jsonl").write_text("")
    recipe.data.train = "train.jsonl"
    made = docker(container_image="graftwork:1", container_mounts=["/data:/data:ro"], env={"WORDS": "two words"})
    lines = normal(script_of(recipe, made, "train"), tmp_path)
    assert lines[0] == "docker run --rm --detach"
    assert lines[1:-1] == [
        "--name=train-NUMBER-train",
        "--hostname=train-NUMBER-train",
        "--network=host",
        "--workdir=/nemo_run/code",
        "--shm-size=8G",
        "--user=1000:100",
        "--gpus=2",
        "--label=nemo-run/experiment-id=train_NUMBER",
        "--label=nemo-run/id=train-ID",
        "--label=nemo-run/name=train-NUMBER-train",
        "--env=GLOO_SOCKET_IFNAME=lo",
        "--env=GRAFTWORK_CACHE=/HERE/cache",
        "'--env=GRAFTWORK_CODE=installed graftwork V'",
        "--env=GRAFTWORK_LAUNCHER=/nemo_run/launcher",
        "--env=HOME=/tmp",
        "--env=LOGLEVEL=WARNING",
        "--env=OMP_NUM_THREADS=1",
        "--env=PET_LOCAL_ADDR=127.0.0.1",
        "--env=PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "--env=PYTHONUNBUFFERED=1",
        "--env=TOKENIZERS_PARALLELISM=false",
        "--env=TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300",
        "--env=USER=graftwork",
        "'--env=WORDS=two words'",
        "--volume=/data:/data:ro",
        "--volume=/HERE/train.jsonl:/HERE/train.jsonl:ro",
        "--volume=/HERE/cache:/HERE/cache",
        "--volume=/HERE/runs/default:/HERE/runs/default",
        "--volume=/HERE/home/experiments/train/train_NUMBER/train:/nemo_run",
    ]
    assert lines[-1].startswith(
        "graftwork:1 bash -c 'torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id 1 --nnodes 1 "
        "--nproc-per-node 2 --node-rank 0 --tee 3 -m nemo_run.core.runners.fdl_runner -n train "
        "/nemo_run/configs/train_fn_or_script 2>&1 | tee -a /nemo_run/log_train-NUMBER-train.out;"
    )
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "home").glob("experiments/*"))


def test_gpus_are_asked_for_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device, default in ((tmp_path, ALL_GPUS), (tmp_path / "absent", None)):
        monkeypatch.setattr(sys.modules[docker.__module__], "DEVICE", device)
        assert docker(container_image="i").num_gpus == default
        assert docker(container_image="i", gpus_per_node=0).num_gpus is None
    with pytest.raises(
        ConfigError, match="gpus_per_node=2, but this machine has no NVIDIA driver; leave it unset, or 0"
    ):
        docker(container_image="i", gpus_per_node=2)
    assert DEVICE.parent == Path("/dev")


def test_the_profile_s_container(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("box: {executor: docker, container_image: 'i:1', network: nemo_run}\n")
    made = docker()
    assert (made.container_image, made.network, "PET_LOCAL_ADDR" in made.env_vars) == ("i:1", "nemo_run", False)
    assert docker(container_image="i:2").container_image == "i:2"
    (tmp_path / "cluster.yaml").unlink()
    with pytest.raises(ConfigError, match=r"^docker\(\): docker needs container_image.$"):
        docker()


def test_the_command_on_this_machine() -> None:
    lines = script_of(llama2_7b.finetune_recipe(num_gpus_per_node=2), local(), "train").splitlines()
    assert lines[0] == "env \\" and "    OMP_NUM_THREADS=1 \\" in lines
    assert re.search(r"torchrun .* --nproc-per-node 2 .* -n train \S+/train_fn_or_script$", lines[-1])
    assert os.path.dirname(sys.executable) in next(line for line in lines if "PATH=" in line)
    alone = script_of(llama2_7b.finetune_recipe(), local(), "train").splitlines()
    assert alone[-1].strip().startswith("python -m nemo_run.core.runners.fdl_runner -n train ")
