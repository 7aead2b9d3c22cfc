"""A cluster, described once in ``cluster.yaml``: what ``slurm()`` and ``docker()`` take unless told otherwise.

The file maps names of profiles to their fields; the first is taken when none is named.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Optional

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from graftwork.errors import ConfigError, quoted, suggest
from graftwork.jsonfile import read_bytes
from graftwork.recipes.document import UniqueKeys

FILE = "cluster.yaml"
"""The name that is looked for from the working directory upwards."""

VARIABLE = "GRAFTWORK_PROFILE"
"""The environment variable that names a profile, a file, or FILE:PROFILE."""

MAX_BYTES = 2**18

_TIME = re.compile(r"\d+(:[0-5]?\d){0,2}|\d+-\d{1,2}(:[0-5]?\d){0,2}")
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_VARIABLE_NAME = re.compile(r"[A-Za-z_]\w*")
_MOUNT = re.compile(r"[^:,\s]+:/[^:,\s]*(:(ro|rw)|:[^:,\s]+)?")


def _matching(pattern: re.Pattern[str], valid: str) -> AfterValidator:
    def matched(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"{quoted(value)} does not fit; valid: {valid}")
        return value

    return AfterValidator(matched)


Time = Annotated[str, _matching(_TIME, "'30' (minutes), '04:00:00', '2-12' (days-hours) or '2-12:30:00'")]
"""A time limit in one of Slurm's forms."""

Memory = Annotated[str, _matching(_MEMORY, "a number with K, M, G or T, such as '64G'")]
Mount = Annotated[str, _matching(_MOUNT, "'/there:/in/the/container', maybe with ':ro'")]
Flag = Annotated[str, _matching(re.compile(r"--[a-z][a-z-]*(=\S.*)?"), "'--name' or '--name=value'")]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class Ssh(_Section):
    """How to reach the cluster's login node from elsewhere."""

    host: str
    user: str
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    identity: Optional[str] = None


class Profile(_Section):
    """One cluster, or one way to use it. ``name`` and ``file`` say where it was read.

    Args:
        nodes: Nodes of a job; unset, the recipe decides.
        gpus_per_node: GPUs of a node, the most that a job takes; the recipe decides how many of them it gets. Unset or
            0: no GPU is asked for.
        cpus_per_task: CPUs of a rank; with torchrun, of all ranks of a node.
        launcher: ``srun`` starts every rank; ``torchrun`` is one task a node that starts its ranks.
        warning: Seconds before the time limit at which Slurm sends SIGUSR1, and the run saves its state; 0 for none.
        requeues: How often a job that has saved its state so goes back into the queue.
        setup: Lines of shell before the run: ``module load``, ``conda activate``.
        job_dir: Directory of the jobs' code and logs, seen by all nodes; unset, NeMo Run's own.
        sbatch: More flags of sbatch.
        srun: More flags of srun.
        code: ``git`` ships the commit, ``installed`` ships nothing: the job runs the package that is installed there.
        allow_dirty: With ``git``: ship uncommitted changes too, and say so in the job's record.
    """

    name: str = ""
    file: str = ""
    executor: Literal["slurm", "docker"] = "slurm"
    account: Optional[str] = None
    partition: Optional[str] = None
    qos: Optional[str] = None
    nodes: Optional[Count] = None
    gpus_per_node: Optional[Annotated[int, Field(ge=0)]] = None
    cpus_per_task: Optional[Count] = None
    memory: Optional[Memory] = None
    time: Time = "01:00:00"
    launcher: Literal["srun", "torchrun"] = "srun"
    warning: Annotated[int, Field(ge=0)] = 120
    requeues: Annotated[int, Field(ge=0)] = 0
    container_image: Optional[str] = None
    container_mounts: list[Mount] = []
    network: str = "host"
    shared_memory: Optional[Memory] = None
    setup: list[str] = []
    env: dict[str, str] = {}
    ssh: Optional[Ssh] = None
    job_dir: Optional[str] = None
    sbatch: list[Flag] = []
    srun: list[Flag] = []
    code: Literal["installed", "git"] = "installed"
    allow_dirty: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Profile":
        if self.ssh is not None and self.executor == "docker":
            raise ValueError("ssh is for slurm only: docker runs on this machine")
        if self.ssh is not None and self.job_dir is None:
            raise ValueError("ssh needs job_dir, a directory on the cluster that all its nodes share")
        if self.job_dir is not None and not self.job_dir.startswith(("/", "~")):
            raise ValueError(f"job_dir={quoted(self.job_dir)} must be an absolute path")
        if self.executor == "docker" and self.container_image is None:
            raise ValueError("docker needs container_image")
        if self.executor == "docker" and (foreign := self.model_fields_set & _SLURM_ONLY):
            raise ValueError(f"{min(foreign)} is for slurm only")
        if taken := next((flag for flag in self.sbatch if _flag_name(flag) in _TAKEN), None):
            raise ValueError(f"sbatch: {quoted(taken)} is set from other fields; {_TAKEN[_flag_name(taken)]} is valid")
        check_environment(self.env)
        return self


_SLURM_ONLY = frozenset({
    "account", "partition", "qos", "nodes", "cpus_per_task", "memory", "time", "launcher", "warning", "requeues",
    "setup", "ssh", "sbatch", "srun",
})  # fmt: skip
_TAKEN = {
    **{name: name for name in ("account", "partition", "qos", "nodes", "gpus_per_node", "cpus_per_task", "time")},
    "mem": "memory",
    "signal": "warning",
    "output": "job_dir",
    "error": "job_dir",
    "chdir": "job_dir",
    **dict.fromkeys(("ntasks", "ntasks_per_node"), "the recipe's number of devices"),
}


def _flag_name(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0].replace("-", "_")


FIELDS = tuple(name for name in Profile.model_fields if name not in ("name", "file"))
"""What a profile may hold in the file."""


def check_environment(env: dict[str, str]) -> None:
    """Raise ConfigError for a name that no shell takes, or a value of several lines."""
    for name, value in env.items():
        if not _VARIABLE_NAME.fullmatch(name):
            raise ConfigError(f"env: {quoted(name)} is no name of a variable; letters, digits and '_' are valid.")
        if "\n" in value:
            raise ConfigError(f"env: the value of {name} has several lines; one is valid.")


def read_profile(name_or_path: Optional[str] = None, start: Optional[Path] = None) -> Profile:
    """Return the profile that is named: NAME, FILE.yaml or FILE.yaml:NAME; None is what ``$GRAFTWORK_PROFILE`` names.

    A bare name is looked up in the nearest ``cluster.yaml`` from ``start`` (default: here) upwards, and the first
    profile of a file is taken when none is named. Raises ConfigError when there is none, or it holds what is not valid.
    """
    profile = find_profile(name_or_path, start)
    if profile is None:
        raise ConfigError(
            f"there is no {FILE} in {quoted(start or Path.cwd())} or above it; 'nemorun graft profile init' writes one."
        )
    return profile


def find_profile(
    name_or_path: Optional[str] = None, start: Optional[Path] = None, executor: Optional[str] = None
) -> Profile | None:
    """Return what ``read_profile`` does, or None when nothing is named and no file is found.

    ``executor``: a named profile of another one is refused; of an unnamed file the first that suits is taken, if any.
    """
    named = name_or_path or os.environ.get(VARIABLE) or None
    file, name = _file_and_name(named, start)
    if file is None:
        return None
    profiles = _read(file)
    chosen = _chosen(profiles, name, file)
    if executor is None or chosen.executor == executor:
        return chosen
    if named is not None:
        raise ConfigError(f"profile {chosen.name!r} of {quoted(file)} is for {chosen.executor}, not for {executor}.")
    return next((one for one in profiles.values() if one.executor == executor), None)


def settings(name_or_path: Optional[str], executor: str, explicit: Mapping[str, object]) -> Profile:
    """Return a profile with the fields of ``explicit`` that are not None put over it; they alone where there is none.

    Raises ConfigError when the profile, or the two together, are not valid.
    """
    found = find_profile(name_or_path, executor=executor)
    fields: dict[str, object] = {"executor": executor} if found is None else found.model_dump(exclude_unset=True)
    for key, value in explicit.items():
        known = fields.get(key)
        if value is not None:
            fields[key] = (
                {**known, **value} if isinstance(known, dict) and isinstance(value, dict) and key == "ssh" else value
            )
    try:
        return Profile.model_validate(fields)
    except ValidationError as error:
        where = f"{executor}()" if found is None else f"{executor}() with profile {quoted(found.name)}"
        raise ConfigError(f"{where}: {explain(error)}") from error


def nearest_file(start: Optional[Path] = None) -> Path | None:
    """Return the nearest ``cluster.yaml`` from ``start`` (default: here) upwards, None when there is none."""
    here = (start or Path.cwd()).resolve()
    return next((path for folder in (here, *here.parents) if (path := folder / FILE).is_file()), None)


def _file_and_name(named: str | None, start: Path | None) -> tuple[Path | None, str | None]:
    if named is None:
        return nearest_file(start), None
    path, colon, name = named.rpartition(":")
    for text, rest in ((named, None), (path, name)) if colon else ((named, None),):
        if text.lower().endswith((".yaml", ".yml")):
            return Path(text).expanduser(), rest
    file = nearest_file(start)
    if file is None:
        raise ConfigError(f"profile {quoted(named)}: there is no {FILE} here or above; FILE.yaml:NAME names another.")
    return file, named


def _chosen(profiles: dict[str, Profile], name: str | None, file: Path) -> Profile:
    if name is None:
        return next(iter(profiles.values()))
    if name not in profiles:
        raise ConfigError(f"{quoted(file)} has no profile {quoted(name)}; {suggest(name, profiles)}")
    return profiles[name]


def _read(file: Path) -> dict[str, Profile]:
    data = read_bytes(file, ConfigError, MAX_BYTES)
    try:
        document = yaml.load(data.decode("utf-8"), Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{quoted(file)}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = quoted(" ".join(str(error).split()), bare=True)
        raise ConfigError(f"{quoted(file)} cannot be read: {reason}.") from error
    if not isinstance(document, dict) or not document:
        raise ConfigError(f"{quoted(file)} holds no profile; NAME: and its fields are valid.")
    return {str(name): _profile(fields, str(name), file) for name, fields in document.items()}


def _profile(fields: object, name: str, file: Path) -> Profile:
    where = f"{quoted(file)}, profile {quoted(name)}"
    if not isinstance(fields, dict):
        hint = f" {suggest(name, FIELDS)}" if name in FIELDS else ""
        raise ConfigError(f"{where} must hold fields, such as executor: slurm; a file maps names to fields.{hint}")
    if name in FIELDS and name != "ssh":
        raise ConfigError(f"{where}: a profile cannot be called as a field is.")
    if reserved := fields.keys() & {"name", "file"}:
        raise ConfigError(f"{where}: there is no field {min(reserved)!r}; {suggest('', FIELDS)}")
    try:
        return Profile.model_validate({**fields, "name": name, "file": str(file)})
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """Return one sentence for the first finding about a profile's fields."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        valid = FIELDS if len(place) == 1 else tuple(Ssh.model_fields)
        return f"there is no field {quoted('.'.join(place))}; {suggest(place[-1], valid)}"
    message = first["msg"].removeprefix("Value error, ").removesuffix(".")
    given = "" if first["type"] in ("value_error", "missing") else f" ({quoted(first['input'])} is given)"
    return ": ".join([part for part in (".".join(place), message[:1].lower() + message[1:]) if part]) + f"{given}."


class _Loader(UniqueKeys):
    """Reads ``10:00:00`` as it stands (YAML 1.1: 36,000) and ``no`` as a name."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|none|None|", ["~", "n", "N", ""]),
    ("bool", r"true|True|false|False", list("tTfF")),
    ("int", r"0|[1-9][0-9]*", list("0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
