"""A recipe's ranks and paths against an executor: refused before anything starts, or placed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch

from graftwork.errors import ConfigError, GraftworkError, ParallelismError
from graftwork.executors import docker, local, slurm
from graftwork.executors.placing.paths import mounts, resolved
from graftwork.executors.placing.placement import check_placement, count_devices, fitted, placed
from graftwork.inference import generate
from graftwork.recipes import llama2_7b, llama2_70b, smollm2_135m


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAFTWORK_PROFILE", raising=False)


def recipe(make: Any = llama2_7b, tensor: int | None = None, **sizes: int) -> run.Partial:
    made = make.finetune_recipe(**sizes)
    if tensor is not None:
        made.trainer.strategy.tensor_model_parallel_size = tensor
        made.trainer.strategy.sequence_parallel = tensor > 1
    return made


def box(**fields: Any) -> run.DockerExecutor:
    return docker(container_image="image", **fields)


Case = tuple[Callable[[], run.Partial], Callable[[], run.Executor | None], type[GraftworkError], str]

REFUSED: dict[str, Case] = {
    "the batch does not fit two replicas": (
        lambda: recipe(smollm2_135m, num_gpus_per_node=2), lambda: None, ParallelismError,
        "global_batch_size=8 must be a multiple of micro_batch_size=8 x 2 data-parallel",
    ),
    "three query groups cannot be cut in two": (
        lambda: recipe(smollm2_135m, tensor=2, num_gpus_per_node=2), lambda: None, ParallelismError,
        "tensor_model_parallel_size=2 must divide num_attention_heads=9; valid: [1, 3, 9]",
    ),
    "fewer devices than the layout": (
        lambda: recipe(tensor=4, num_gpus_per_node=2), slurm, ParallelismError, "2 device(s) cannot be laid out",
    ),
    "more tasks than devices": (
        recipe, lambda: slurm(ntasks_per_node=2), ParallelismError,
        "the recipe has trainer.devices=1, but the executor ntasks_per_node=2: set one of them to the other's value",
    ),
    "more nodes than the recipe's": (
        recipe, lambda: slurm(nodes=2), ParallelismError, "trainer.num_nodes=1, but the executor nodes=2",
    ),
    "more devices than GPUs of a node": (
        lambda: recipe(num_gpus_per_node=8), lambda: slurm(gpus_per_node=4), ParallelismError,
        "trainer.devices=8 is more than the executor's gpus_per_node=4.",
    ),
    "two nodes here": (
        lambda: recipe(num_nodes=2), lambda: None, ConfigError, "needs an executor that reaches 2 machines",
    ),
    "two nodes in one container": (
        lambda: recipe(num_nodes=2), box, ParallelismError, "DockerExecutor is one machine",
    ),
    "packed rows cut over ranks": (
        lambda: packed(), slurm, ParallelismError, "seq_length=2047 must be a multiple of",
    ),
}  # fmt: skip


def packed() -> run.Partial:
    made = recipe(tensor=2, num_gpus_per_node=2)
    made.data.packing, made.data.seq_length = True, 2047
    return made


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_and_named(case: str) -> None:
    make, executor, kind, message = REFUSED[case]
    with pytest.raises(kind) as caught:
        check_placement(make(), executor())
    assert message in str(caught.value)


def test_gpus_that_are_not_here_are_refused_here_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = recipe(num_gpus_per_node=2)
    made.trainer.accelerator = "gpu"
    for executor in (None, local(2)):
        with pytest.raises(ConfigError, match="trainer.accelerator='gpu'.* this machine.*valid"):
            check_placement(made, executor)
    check_placement(made, slurm())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ParallelismError, match=r"devices=2 is more than the 1 GPU\(s\) of this machine; valid: 1 to 1"):
        check_placement(made, None)


def test_a_size_of_one_follows_the_recipe() -> None:
    two = recipe(num_nodes=2, num_gpus_per_node=4)
    made = fitted(two, slurm(gpus_per_node=8))
    assert (made.nodes, made.ntasks_per_node, made.gpus_per_node, "MASTER_ADDR" in made.env_vars) == (2, 4, 4, False)
    again = fitted(two, made)
    assert (again.nodes, again.ntasks_per_node, again.gpus_per_node) == (2, 4, 4)
    alone = fitted(recipe(), slurm())
    assert (alone.ntasks_per_node, alone.gpus_per_node, alone.env_vars["MASTER_ADDR"]) == (1, None, "127.0.0.1")
    given = slurm(env={"MASTER_ADDR": "node1"})
    assert fitted(recipe(), given).env_vars["MASTER_ADDR"] == "node1"


@pytest.mark.parametrize("executor", [local, box], ids=["local", "docker"])
def test_several_ranks_of_one_machine_start_under_torchrun(executor: Callable[[], run.Executor]) -> None:
    given = executor()
    made = fitted(recipe(num_gpus_per_node=2), given)
    assert (made.nproc_per_node(), type(made.get_launcher()), given.launcher) == (2, run.Torchrun, None)
    assert fitted(recipe(), given).launcher is None


def test_without_a_trainer_an_executor_keeps_its_size() -> None:
    task = run.Partial(generate, base="smollm2_135m")
    assert fitted(task, local(2)).nproc_per_node() == 2


@pytest.mark.parametrize("shape", [(70, 1, 8), (7, 2, 4), (7, 1, 1)])
def test_published_recipes_pass(shape: tuple[int, int, int]) -> None:
    size, nodes, devices = shape
    made = recipe({70: llama2_70b, 7: llama2_7b}[size], num_nodes=nodes, num_gpus_per_node=devices)
    check_placement(made, slurm(nodes=nodes, ntasks_per_node=devices, gpus_per_node=8))


def test_devices_in_every_form() -> None:
    assert [count_devices(one) for one in (2, "2", [0, 3], "auto", -1)] == [
        2,
        2,
        2,
        *[max(1, torch.cuda.device_count())] * 2,
    ]
    for wrong in ("two", 0, None):
        with pytest.raises(ConfigError, match="is no number of devices"):
            count_devices(wrong)


def test_a_job_sees_the_paths_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    made = recipe(smollm2_135m)
    made.data.train, made.data.validation = "train.jsonl", "absent.jsonl"
    found = resolved(made, slurm())
    assert found.data.train == str(tmp_path / "train.jsonl")
    assert found.data.validation == "absent.jsonl" and found.model.checkpoint == "smollm2_135m"
    assert found.trainer.default_root_dir == str(tmp_path / "runs/default")
    assert made.trainer.default_root_dir == "runs/default" and resolved(made, local()) is made
    made.data.train = ["train.jsonl", "absent.jsonl"]
    found = resolved(made, slurm())
    assert found.data.train == [str(tmp_path / "train.jsonl"), "absent.jsonl"]
    assert f"{tmp_path}/train.jsonl:{tmp_path}/train.jsonl:ro" in mounts(found)


def test_over_ssh_a_relative_run_directory_is_refused() -> None:
    far = slurm(host="login", user="me", job_dir="/shared/jobs")
    with pytest.raises(ConfigError, match="trainer.default_root_dir='runs/default' is relative.* all its nodes share"):
        resolved(recipe(), far)
    made = recipe(dir="/shared/runs")
    made.data.train = "/shared/train.jsonl"
    assert resolved(made, far) is made


def test_a_container_reads_read_only_and_writes_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base").mkdir()
    (tmp_path / "train.jsonl").write_text("")
    made = recipe(smollm2_135m)
    made.data.train, made.model.checkpoint = "train.jsonl", "base"
    found, executor = placed(made, box(container_mounts=[f"{tmp_path}/other:/other"]))
    assert executor.volumes == [
        f"{tmp_path}/other:/other",
        f"{tmp_path}/base:{tmp_path}/base:ro",
        f"{tmp_path}/train.jsonl:{tmp_path}/train.jsonl:ro",
        f"{tmp_path}/cache:{tmp_path}/cache",
        f"{tmp_path}/runs/default:{tmp_path}/runs/default",
    ]
    assert executor.env_vars["GRAFTWORK_CACHE"] == str(tmp_path / "cache") and not (tmp_path / "runs").exists()
    assert placed(found, executor)[1].volumes == executor.volumes


def test_a_verb_s_own_paths(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    task = run.Partial(generate, base="smollm2_135m", adapter="adapter", prompts=["a"], output="out/answers.jsonl")
    found = resolved(task, box())
    assert (found.base, found.adapter) == ("smollm2_135m", str(tmp_path / "adapter"))
    assert f"{tmp_path}/out:{tmp_path}/out" in mounts(found) and found.output == str(tmp_path / "out/answers.jsonl")
