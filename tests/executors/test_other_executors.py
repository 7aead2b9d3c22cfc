"""NeMo Run's executors of the cloud take a recipe as it is; their clients and accounts are not needed to see how."""

import gc
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
from nemo_run.core.execution import kubeflow, skypilot
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from nemo_run.run.torchx_backend.packaging import package

from graftwork.errors import ConfigError, ParallelismError
from graftwork.executors.placing.placement import check_placement, placed
from graftwork.executors.process.task import as_task
from graftwork.executors.submission.script import script_of
from graftwork.recipes import llama2_7b
from graftwork.recipes.show import with_text

# NeMo Run's commands leave their pipes open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

Make = Callable[..., run.Executor]


def sky(**sizes: Any) -> run.Executor:
    return run.SkypilotExecutor(gpus="H100", num_nodes=sizes.get("nodes", 1), gpus_per_node=sizes.get("ranks", 1),
                                launcher=sizes.get("launcher"))  # fmt: skip


def dgx(nodes: int = 1, ranks: int = 1, launcher: str | None = None) -> run.Executor:
    return run.DGXCloudExecutor(
        base_url="https://dgx.invalid", kube_apiserver_url="https://kube.invalid", client_id="id",
        client_secret="secret", project_name="project", container_image="image", pvc_nemo_run_dir="/pvc",
        pvcs=[{"path": "/pvc"}], nodes=nodes, gpus_per_node=ranks, launcher=launcher, packager=run.Packager(),
    )  # fmt: skip


def lepton(nodes: int = 1, ranks: int = 1, launcher: str | None = None) -> run.Executor:
    return run.LeptonExecutor(
        container_image="image", nemo_run_dir="/run", nodes=nodes, gpus_per_node=ranks, launcher=launcher,
        packager=run.Packager(),
    )  # fmt: skip


def kube(nodes: int = 1, ranks: int = 1, launcher: str | None = None) -> run.Executor:
    return run.KubeflowExecutor(
        image="image", num_nodes=nodes, gpus_per_node=ranks, launcher=launcher, packager=run.Packager()
    )


EXECUTORS: dict[str, Make] = {"skypilot": sky, "dgx cloud": dgx, "lepton": lepton, "kubeflow": kube}
DRY = ("dgx cloud", "lepton", "kubeflow")
"""Those whose dry run needs no package of the cloud."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    # Their packages may be absent; what they would connect to is.
    monkeypatch.setattr(skypilot, "_SKYPILOT_AVAILABLE", True)
    monkeypatch.setattr(kubeflow, "_KUBERNETES_AVAILABLE", True)
    monkeypatch.setattr(kubeflow.KubeflowExecutor, "_load_kube_clients", lambda self: None)
    yield
    gc.collect()


def recipe(directory: str = "/shared/runs", **sizes: int) -> run.Partial:
    return llama2_7b.finetune_recipe(dir=directory, **sizes)


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_recipe_arrives_unchanged(name: str, tmp_path: Path) -> None:
    given = recipe(num_nodes=2, num_gpus_per_node=2)
    task, executor = placed(given, EXECUTORS[name](nodes=2, ranks=2, launcher="torchrun"))
    assert task is given
    executor.assign("train_1", str(tmp_path / "home/experiments/train/train_1"), "train", "train")
    made = package("train", as_task(task), executor, serialize_to_file=True)
    [role] = made.roles
    words = list(role.args)
    assert role.entrypoint == "torchrun" and words[words.index("--nproc-per-node") + 1] == "2"
    assert words[words.index("--nnodes") + 1] == "2"
    [config] = (tmp_path / "home").rglob("train_fn_or_script")
    sent = fdl.build(ZlibJSONSerializer().deserialize(config.read_text())).keywords["recipe"]
    assert json.loads(sent) == json.loads(as_task(given).recipe) and fdl.build(with_text(given)) is not None


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_shows_the_job(name: str) -> None:
    shown = script_of(recipe(num_nodes=2, num_gpus_per_node=2), EXECUTORS[name](2, 2, "torchrun"), "train")
    assert "torchrun" in shown and "train_fn_or_script" in shown


@pytest.mark.parametrize("name", EXECUTORS)
def test_sizes_and_paths_are_checked(name: str) -> None:
    make = EXECUTORS[name]
    check_placement(recipe(), make())
    with pytest.raises(ParallelismError, match="trainer.num_nodes=1, but the executor nodes=2: set one of them to the"):
        check_placement(recipe(), make(nodes=2))
    with pytest.raises(ParallelismError, match="trainer.devices=2, but the executor ntasks_per_node=1"):
        check_placement(recipe(num_gpus_per_node=2), make())
    with pytest.raises(ConfigError, match="has no launcher='torchrun' to start them"):
        check_placement(recipe(num_gpus_per_node=2), make(ranks=2))
    with pytest.raises(ConfigError, match="trainer.default_root_dir='runs/default' is relative"):
        placed(recipe("runs"), make())
