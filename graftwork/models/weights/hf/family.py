"""A model family: what it answers to, how its config becomes a Shape and back, and its weight mapping."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping as ReadOnly
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from graftwork import parallel
from graftwork.errors import CheckpointError, ConfigError, quoted, suggest
from graftwork.jsonfile import read_object, refuse_outside
from graftwork.models.shape import Shape
from graftwork.models.weights.mapping import Mapping
from graftwork.registry import Registry

Config = ReadOnly[str, object]
"""``config.json`` of a Hugging Face checkpoint."""

MOST = sys.float_info.max
ShapeFields = dict[str, Any]
"""Fields of a Shape with the values that a config gives them, whatever they are: Shape refuses what cannot work."""


class Family(ABC):
    """One ``model_type``; a subclass without state, entered in FAMILIES.

    ``name``: the model_type, also ``Shape.family``; ``architecture``: what config.json calls the class, ``earlier``:
    what it once did; ``notes``: the family's line in the docs; ``kind``: which class of ``graftwork.models`` its
    checkpoints become; ``shape_class``: what describes them; ``mixture``: whether they are mixtures of experts.

    Every field of transformers' config class is in one of ``used`` (by ``read``), ``fixed`` (its valid values, None:
    absent) and ``irrelevant`` (with the reason), here or above for all families. ``defaults``: what transformers takes
    for an absent field; ``aliases``: a field's other name -> its name. A field that the class of transformers does not
    have changes nothing there either, and is not looked at.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    earlier: ClassVar[tuple[str, ...]] = ()
    notes: ClassVar[str]
    kind: ClassVar[str] = "gpt"
    shape_class: ClassVar[type[Shape]] = Shape
    mixture: ClassVar[bool] = False
    used: ClassVar[frozenset[str]] = frozenset()
    fixed: ClassVar[ReadOnly[str, tuple[object, ...]]] = {}
    irrelevant: ClassVar[ReadOnly[str, str]] = {}
    defaults: ClassVar[Config] = {}
    aliases: ClassVar[ReadOnly[str, str]] = {}

    @abstractmethod
    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields that ``config`` describes, ``family`` left out.

        Every field that changes the mathematics is used or refused (CheckpointError); KeyError for one that is absent.
        """

    @abstractmethod
    def write(self, shape: Shape) -> Config:
        """Return the config fields of ``shape`` beside those that every family has: the inverse of ``read``."""

    @abstractmethod
    def mapping(self, shape: Shape, padded: int) -> Mapping:
        """Return the rules of ``shape`` with a vocabulary of ``padded`` rows."""


FIXED: ReadOnly[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (None, False),
}
"""Fields of every family that change the mathematics, with their valid values."""
IRRELEVANT: ReadOnly[str, str] = {
    **dict.fromkeys(("transformers_version", "architectures", "name_or_path"), "says where the file comes from"),
    **dict.fromkeys(("dtype", "torch_dtype"), "read where the model's precision is chosen"),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict"), "says what else is returned"),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), "belongs to a classifier"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "belongs to tokenizer and generation"),
    "chunk_size_feed_forward": "the same arithmetic in parts",
    "initializer_range": "spread of random weights",
    "pretraining_tp": "the same arithmetic in parts",
    "use_cache": "the same logits, computed once",
    "max_window_layers": "counts only with use_sliding_window",
}
"""Fields of every family that change no logits of a loaded causal model, with the reason."""

_GEMMA = "its layers have a norm behind attention and one behind the MLP"
INEXPRESSIBLE: ReadOnly[str, str] = {
    "gemma": "its embeddings are multiplied by the root of hidden_size; megatron-core's GPTModel has no place for that",
    "gemma2": f"{_GEMMA}, and its attention scores and logits a soft cap; megatron-core's GPTModel has none of these",
    **dict.fromkeys(
        ("gemma3", "gemma3_text"),
        f"{_GEMMA}, and most of them a window and a rotary base of their own; megatron-core's GPTModel has one base "
        "for all layers, and none of these norms",
    ),
}
"""Model types that are asked for and cannot be computed exactly, with the reason."""

FAMILIES: Registry[Family] = Registry("family")
"""Every family by its ``model_type``: the one list of them."""


def family_named(name: str) -> Family:
    """Return the family that a Shape names; raises ConfigError with near names when there is none."""
    if name not in FAMILIES:
        raise ConfigError(f"Shape.family is {name!r}; {suggest(name, FAMILIES)}")
    return FAMILIES[name]


def family_of(config: Config) -> Family:
    """Return the family that a checkpoint's config names; raises CheckpointError with near names when there is none."""
    name = config.get("model_type")
    if isinstance(name, str) and name in INEXPRESSIBLE:
        valid = ", ".join(FAMILIES)
        raise CheckpointError(f"model_type {name!r} is not supported: {INEXPRESSIBLE[name]}; valid: {valid}.")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"model_type {quoted(name)} is not supported; {suggest(str(name)[:100], FAMILIES)}")
    return FAMILIES[name]


def check_architecture(config: Config) -> None:
    """Raise CheckpointError where config.json names another class of the family: an encoder alone, a classifier.

    A config that names none is taken for that of the family.
    """
    family = family_of(config)
    named, valid = config.get("architectures"), (family.architecture, *family.earlier)
    if not isinstance(named, list) or not named:
        return
    if not {str(one).lower() for one in named} & {one.lower() for one in valid}:  # LLaMAForCausalLM was one spelling
        raise CheckpointError(
            f"architectures={quoted(named)} of config.json is no model that generates text; valid for model_type "
            f"{family.name!r}: {family.architecture}."
        )


def read_config(directory: str | Path) -> dict[str, object]:
    """Return ``config.json`` of a Hugging Face checkpoint directory.

    Raises CheckpointError when the directory or the file is missing or is no JSON object.
    """
    folder = Path(directory)
    path = folder / "config.json"
    try:
        if not folder.is_dir():
            raise CheckpointError(f"the checkpoint directory {quoted(folder)} does not exist.")
        if not path.is_file():
            raise CheckpointError(
                f"{quoted(folder)} has no config.json: a Hugging Face checkpoint directory is expected."
            )
    except OSError as error:  # a name too long, a directory without permission
        raise CheckpointError(f"{quoted(folder)} cannot be read: {error.strerror}.") from error
    refuse_outside(folder, path, CheckpointError)
    return read_object(path, CheckpointError)


def shape_from_hf(config: Config) -> Shape:
    """Return the Shape of a Hugging Face config; raises CheckpointError for a model that cannot be expressed."""
    family = family_of(config)
    try:
        return family.shape_class(family=family.name, **family.read(_complete(family, config)))
    except KeyError as error:
        raise CheckpointError(f"config.json of this {family.name} model has no field {error}.") from error
    except ConfigError as error:
        raise CheckpointError(f"config.json describes no valid model: {error}") from error


def hf_config(shape: Shape) -> dict[str, object]:
    """Return the Hugging Face config of ``shape``; ``shape_from_hf`` is its inverse.

    Raises ConfigError when no model of this family has such a shape.
    """
    family = family_named(shape.family)
    config = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_embeddings,
        **family.write(shape),
    }
    _check_expressible(shape, shape_from_hf(config))
    return config


def mapping_for(shape: Shape, tensor_parallel: int | None = None) -> Mapping:
    """Return the mapping of ``shape``; ``tensor_parallel`` sets the vocabulary padding (None: the current size).

    Raises ConfigError for an unknown family, and for experts in a family that has none, or none where it has some.
    """
    family = family_named(shape.family)
    if family.mixture != (shape.num_moe_experts is not None):
        mixtures = ", ".join(repr(name) for name, one in FAMILIES.items() if one.mixture is not family.mixture)
        raise ConfigError(
            f"no Hugging Face {family.name} model has num_moe_experts={shape.num_moe_experts}; "
            f"{'a number' if family.mixture else 'None'} is valid, or one of these as family: {mixtures}."
        )
    padded = shape.padded_vocab_size(_current_size() if tensor_parallel is None else tensor_parallel)
    return family.mapping(shape, padded)


def family_table() -> str:
    """Return the Markdown table of all families, as the docs show it."""
    rows = (f"| `{family.name}` | {family.notes} |" for family in FAMILIES.values())
    return "\n".join(("| Hugging Face `model_type` | notes |", "|---|---|", *rows))


def refuse(config: Config, field: str, valid: tuple[object, ...]) -> None:
    """Raise CheckpointError unless ``field`` is one of ``valid`` (None: absent)."""
    if config.get(field) not in valid:
        names = ", ".join(repr(v) for v in valid if v is not None) or "null"
        raise CheckpointError(f"{field}={quoted(config.get(field))} of config.json is not supported; valid: {names}.")


def number(config: Config, field: str, default: float | None = None) -> float:
    """Return ``field`` as a float, ``default`` when absent (None: KeyError); raises CheckpointError for no number."""
    value = config[field] if default is None else config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MOST <= value <= MOST:
        raise CheckpointError(f"{field}={quoted(value)} of config.json is not a number.")
    return float(value)


def flag(config: Config, field: str, default: bool) -> bool:
    """Return ``field`` as true or false, ``default`` when absent; raises CheckpointError for anything else."""
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{field}={quoted(value)} of config.json is neither true nor false.")
    return value


def _complete(family: Family, config: Config) -> Config:
    """Return ``config`` in the family's own names, absent fields filled in; refuses fields away from valid values."""
    named = dict(config)
    for alias, name in family.aliases.items():
        if alias not in named:
            continue
        value = named.pop(alias)
        if named.setdefault(name, value) != value:
            raise CheckpointError(f"config.json has {alias} and {name}, which mean the same, with different values.")
    complete = {**family.defaults, **named}
    for field, valid in {**FIXED, **family.fixed}.items():
        refuse(complete, field, valid)
    return complete


def _current_size() -> int:
    return parallel.tp_size() if parallel.is_initialized() else 1


def _check_expressible(shape: Shape, back: Shape) -> None:
    # Dropout is a training choice, not part of the weights: not every family has a place for it.
    differing = [f.name for f in fields(back) if getattr(shape, f.name, None) != getattr(back, f.name)]
    lost = [name for name in differing if not name.endswith("_dropout")]
    if lost:
        shown = ", ".join(f"{name}={getattr(shape, name)!r}" for name in lost)
        raise ConfigError(f"no Hugging Face {shape.family} model has {shown}.")
