"""What a ``proof.json`` holds: a small batch, and what base and adapters made of it when they were written.

It stands beside the other files of an artifact, an export or a merged model and names their checksum (of a model: its
fingerprint); loading never reads it.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from graftwork.errors import ArtifactError, quoted
from graftwork.jsonfile import parse_json, read_bytes, refuse_outside, validated
from graftwork.peft.artifact.config import Name

PROOF = "proof.json"
MOST_BYTES = 4 * 2**20
"""Largest proof that is read: one of a hundred adapters has a tenth of it."""
MOST_ROWS = 64

Id = Annotated[int, Field(ge=0, lt=2**30)]
Row = Annotated[list[Id], Field(min_length=1, max_length=256)]
Rows = Annotated[list[Row], Field(min_length=1, max_length=MOST_ROWS)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Probe(_Part):
    """A batch of real token ids: what stands before each row's answer, the answer, and the row's task.

    The virtual tokens of the prompts that act are put in front where the probe is run, wherever the model holds them.
    """

    prompts: Rows
    answers: Rows
    tasks: list[Name | None] = Field(min_length=1, max_length=MOST_ROWS)


class View(_Part):
    """What some of the adapters (none: the base) made of the probe: logits [n, vocabulary] of the answers' tokens.

    digest: SHA-256 of all of them as fp32; scale: the largest magnitude; values: those of some ``columns``.
    """

    adapters: list[Name] = Field(max_length=256)
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scale: Annotated[float, Field(ge=0)]
    values: list[Annotated[list[float], Field(max_length=256)]] = Field(min_length=1, max_length=MOST_ROWS * 256)


class Proof(_Part):
    """A probe with its views, the checksum of the artifact that they are of, and where they were computed."""

    format: Literal["graftwork proof"] = "graftwork proof"
    schema_: Literal[1] = Field(alias="schema", default=1)
    artifact: str
    probe: Probe
    columns: list[Id] = Field(min_length=1, max_length=256)
    views: list[View] = Field(min_length=1, max_length=300)
    tolerance: Annotated[float, Field(gt=0, le=1)]
    dtype: Literal["fp32", "bf16"]
    device: Name
    layout: dict[Name, int | bool | None] = Field(max_length=100)
    versions: dict[Name, str | None] = Field(max_length=100)
    checksum: str = ""


def sealed(proof: Proof) -> str:
    """Return the text of the file: the proof with a checksum over all of it."""
    content = proof.model_dump(by_alias=True, exclude={"checksum"})
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1, allow_nan=False) + "\n"


def read(directory: str | Path, artifact: str | None) -> Proof:
    """Return the proof of the artifact with this checksum.

    Raises ArtifactError where there is none, it was changed, or it is another artifact's.
    """
    file, where = Path(directory) / PROOF, quoted(directory)
    if not file.is_file():
        raise ArtifactError(
            f"{where} carries no proof: it was written by an earlier version, without verify, or where its base was "
            "not at hand; write it again."
        )
    refuse_outside(Path(directory), file, ArtifactError)
    what = f"{PROOF} in {where}"
    raw = parse_json(read_bytes(file, ArtifactError, MOST_BYTES), what, ArtifactError)
    proof = validated(raw, Proof, what, ArtifactError)
    if not isinstance(raw, dict) or proof.checksum != _checksum({k: v for k, v in raw.items() if k != "checksum"}):
        raise ArtifactError(f"{what} was changed: its checksum does not match; write what it is of again.")
    if proof.artifact != artifact:
        raise ArtifactError(f"{what} is the proof of another adapter; write this one again.")
    probe, size = proof.probe, len(proof.probe.prompts)
    positions = sum(map(len, probe.answers))
    fits = len(probe.answers) == len(probe.tasks) == size and all(
        len(view.values) == positions and all(len(row) == len(proof.columns) for row in view.values)
        for view in proof.views
    )
    if not fits or proof.views[0].adapters:
        raise ArtifactError(f"{what} does not fit together: rows, answers, tasks and values differ in number.")
    return proof


def _checksum(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
