"""cluster.yaml: which profile is meant, what is valid in it, what is tried out."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from graftwork.cli.profile import profile as verb
from graftwork.errors import ConfigError, LaunchError
from graftwork.executors.cluster.checkup import check_up
from graftwork.executors.cluster.profile import FIELDS, VARIABLE, Profile, Ssh, find_profile, read_profile, settings
from graftwork.executors.cluster.profile_text import TEXT

TWO = """\
small:
  partition: debug
  time: 10:00:00
big:
  account: lab
  partition: no
  nodes: 2
  gpus_per_node: 8
  ssh: {host: login, user: me, port: 2222}
  job_dir: /shared/jobs
box:
  executor: docker
  container_image: graftwork:latest
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def written(folder: Path, text: str = TWO) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_the_nearest_file_upwards_and_its_first_profile(tmp_path: Path) -> None:
    written(tmp_path)
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    assert read_profile(start=deep).name == "small"
    written(tmp_path / "a", "near: {executor: slurm}")
    assert read_profile(start=deep).name == "near"
    assert read_profile(None, deep).file == str(tmp_path / "a" / "cluster.yaml")


def test_a_profile_is_named_by_its_name_its_file_or_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "elsewhere")
    assert read_profile(f"{path}").name == "small"
    assert read_profile(f"{path}:big").nodes == 2
    with pytest.raises(ConfigError, match="there is no cluster.yaml here or above; FILE.yaml:NAME names another"):
        read_profile("big")
    written(tmp_path)
    assert read_profile("big").account == "lab"
    monkeypatch.setenv(VARIABLE, "box")
    assert read_profile().name == "box"
    monkeypatch.setenv(VARIABLE, f"{path}:big")
    assert (read_profile().name, read_profile("small").name) == ("big", "small")


def test_without_a_file_there_is_no_profile() -> None:
    assert find_profile() is None
    with pytest.raises(ConfigError, match="no cluster.yaml in .* 'nemorun graft profile init' writes one"):
        read_profile()


def test_values_mean_what_they_look_like(tmp_path: Path) -> None:
    written(tmp_path)
    assert read_profile().time == "10:00:00"  # YAML 1.1 reads 36000
    assert read_profile("big").partition == "no"  # and False
    assert read_profile("big").ssh == Ssh(host="login", user="me", port=2222)


WRONG = {
    "a: {partitoin: x}": "profile 'a': there is no field 'partitoin'; did you mean 'partition' or",
    "a: {ssh: {host: h, user: u, prot: 1}, job_dir: /x}": "there is no field 'ssh.prot'; did you mean 'port' or",
    "a: {ssh: {host: h, user: u}}": "ssh needs job_dir",
    "a: {ssh: {host: h}, job_dir: /x}": "ssh.user: field required.",
    "a: {executor: slrum}": "executor: input should be 'slurm' or 'docker' ('slrum' is given).",
    "a: {executor: docker}": "docker needs container_image.",
    "a: {executor: docker, container_image: i, partition: p}": "partition is for slurm only.",
    "a: {time: soon}": "time: 'soon' does not fit; valid: '30' (minutes)",
    "a: {time: '1:99:00'}": "'1:99:00' does not fit",
    "a: {nodes: 0}": "nodes: input should be greater than or equal to 1 (0 is given).",
    "a: {memory: lots}": "memory: 'lots' does not fit",
    "a: {container_mounts: [here]}": "container_mounts.0: 'here' does not fit; valid: '/there:/in/the/container'",
    "a: {sbatch: ['--nodes=2']}": "sbatch: '--nodes=2' is set from other fields; nodes is valid.",
    "a: {sbatch: ['-p x']}": "sbatch.0: '-p x' does not fit",
    "a: {env: {A B: c}}": "env: 'A B' is no name of a variable",
    "a: {job_dir: jobs}": "job_dir='jobs' must be an absolute path.",
    "a: {qos: x}\na: {qos: y}": "the key 'a' is given twice",
    "partition: x": "profile 'partition' must hold fields",
    "partition: {}": "a profile cannot be called as a field is",
    "a: [1]": "profile 'a' must hold fields",
    "[1]": "holds no profile",
    "": "holds no profile",
    "a: {": "cannot be read",
    "a: {name: b}": "there is no field 'name'",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_valid_is_named_in_one_sentence(text: str, tmp_path: Path) -> None:
    written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_profile()
    assert WRONG[text] in str(caught.value) and "\n" not in str(caught.value) and "cluster.yaml" in str(caught.value)


def test_a_profile_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ConfigError, match="has no profile 'bgi'; did you mean 'big'"):
        read_profile("bgi")


def test_what_is_given_wins_over_the_profile(tmp_path: Path) -> None:
    written(tmp_path)
    made = settings("big", "slurm", {"nodes": 4, "account": None, "ssh": {"port": 22}})
    assert (made.nodes, made.account, made.gpus_per_node) == (4, "lab", 8)
    assert made.ssh == Ssh(host="login", user="me", port=22)
    assert settings(None, "docker", {}).name == "box"  # the first one for this executor
    with pytest.raises(ConfigError, match="profile 'box' of .* is for docker, not for slurm"):
        settings("box", "slurm", {})
    with pytest.raises(ConfigError, match=r"^slurm\(\) with profile 'small': time: 'x' does not fit"):
        settings(None, "slurm", {"time": "x"})


def test_the_written_file_is_valid_and_holds_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb("init")
    assert read_profile() == Profile(name="cluster", file=str(tmp_path / "cluster.yaml"), time="01:00:00", warning=120,
                                     code="installed", executor="slurm")  # fmt: skip
    assert capsys.readouterr().out.startswith("wrote cluster.yaml")
    assert [field for field in FIELDS if not re.search(rf"^[# ]*{field}:", TEXT, re.MULTILINE)] == []
    with pytest.raises(ConfigError, match="is there already and stays as it is"):
        verb("init")
    assert (tmp_path / "cluster.yaml").read_text() == TEXT


def test_every_line_of_the_written_file_is_valid_when_it_is_switched_on(tmp_path: Path) -> None:
    cluster, remote, laptop = re.split(r"^# (?=remote:|laptop:)", TEXT, flags=re.MULTILINE)
    switched = re.sub(r"^  # (?=\w+:|  )", "  ", cluster, flags=re.MULTILINE)
    others = "\n".join(line.removeprefix("# ") for line in f"{remote}{laptop}".splitlines())
    path = written(tmp_path, f"{switched}\n{others}\n")
    assert read_profile(str(path)).model_fields_set >= {"account", "setup", "container_mounts", "env", "allow_dirty"}
    assert read_profile(f"{path}:remote").ssh and read_profile(f"{path}:laptop").executor == "docker"


def test_check_finds_what_is_missing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "mkdir", "mktemp", "rm"):
        (tmp_path / "bin" / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = {one.what: one for one in check_up(Profile(job_dir="/dev/null/jobs", code="git"))}
    assert {what: one.good for what, one in found.items()} == {"slurm": False, "job directory": False, "code": False}
    assert found["slurm"].words == "sbatch, srun, sacct, scancel not found"
    assert "/dev/null" in found["job directory"].words and "needs git" in found["code"].words
    good = {one.what: one.good for one in check_up(Profile(job_dir=str(tmp_path / "jobs")))}
    assert good["job directory"] and good["code"] and list((tmp_path / "jobs").iterdir()) == []


def test_check_names_a_host_that_does_not_answer() -> None:
    unknown = Profile(ssh=Ssh(host="no-such-host.invalid", user="me"), job_dir="/x")
    first, last = list(check_up(unknown))
    assert not first.good and first.words.startswith("me@no-such-host.invalid:22: ") and last.what == "code"


def test_the_verb_prints_a_line_for_each_finding_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "a: {job_dir: /dev/null/jobs}")
    with pytest.raises(LaunchError, match=r"^profile 'a': [1-9] of these failed.$"):
        verb("check")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("profile 'a' of ") and all(line[:6] in ("ok    ", "FAILED") for line in lines[1:])
    with pytest.raises(ConfigError, match="no such action; did you mean 'check'"):
        verb("chekc")


def test_a_profile_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Profile().nodes = 2  # type: ignore[misc]
