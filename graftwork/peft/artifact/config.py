"""What ``adapter_config.json`` holds, as a schema with limits: whatever reads it has been checked by it."""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

FORMAT: Final = "graftwork"
SCHEMA = 1

Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=2000)]
Value = Text | bool | int | float | None
Values = Annotated[list[Value], Field(max_length=4096)]
Option = Value | Values | Annotated[dict[Name, Value | Values], Field(max_length=4096)]


ByTask = Annotated[dict[Name, str], Field(max_length=4096)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Prompt(_Part):
    """How rows were put to the model in training, by the names of the data module's options."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Value] = Field(init=False)

    prompt_template: str | ByTask | None = None
    answer_template: str | ByTask | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None


class Entry(_Part):
    """One adapter: its method, what rebuilds it, and how it was trained to be asked (where that is known)."""

    method: Name
    hyperparameters: dict[Name, Option] = Field(max_length=100)
    prompt: Prompt | None = None

    @property
    def name(self) -> str:
        """The adapter's name: a hyper-parameter of every method."""
        return str(self.hyperparameters.get("name"))


class BaseEntry(_Part):
    """The base an adapter belongs to: name, family, sizes and the fingerprint of its checkpoint."""

    name: str
    family: Name
    shape: dict[Name, JsonValue] = Field(min_length=1, max_length=200)
    fingerprint: str | None


class ArtifactConfig(_Part):
    """The stack inner to outer, what it belongs to and where it comes from; ``checksum`` is over everything else.

    ``stack`` names all adapters of the model that was saved, inner to outer, also those that were left out; artifacts
    of earlier versions lack it.
    """

    format: Literal["graftwork"] = FORMAT
    peft_type: Literal["GRAFTWORK"] = "GRAFTWORK"
    schema_: int = Field(alias="schema", default=SCHEMA)
    adapters: list[Entry] = Field(min_length=1, max_length=256)
    stack: list[Name] | None = Field(default=None, max_length=4096)
    base: BaseEntry
    dtype: Literal["float32"] = "float32"
    step: int | None
    recipe: str | None
    versions: dict[Name, str | None] = Field(max_length=100)
    checksum: str | None = None

    @property
    def order(self) -> list[str]:
        """The names of the saved model's adapters, inner to outer, as far as they are known."""
        return self.stack if self.stack is not None else [entry.name for entry in self.adapters]
