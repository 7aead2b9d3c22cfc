"""What ``adapter_config.json`` holds."""

from typing import Any, NotRequired, TypedDict


class Entry(TypedDict):
    """One adapter: its method, what rebuilds it, and how it was trained to be asked (where that is known)."""

    method: str
    hyperparameters: dict[str, Any]
    prompt: NotRequired[dict[str, object]]


class BaseEntry(TypedDict):
    """The base an adapter belongs to: name, family, sizes and the fingerprint of its checkpoint."""

    name: str
    family: str
    shape: dict[str, object]
    fingerprint: str | None


class ArtifactConfig(TypedDict):
    """The stack in order, what it belongs to and where it comes from; ``checksum`` is over everything else."""

    format: str
    peft_type: str
    schema: int
    adapters: list[Entry]
    base: BaseEntry
    dtype: str
    step: int | None
    recipe: str | None
    versions: dict[str, str | None]
    checksum: NotRequired[str]
