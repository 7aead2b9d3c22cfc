"""Named shapes: functions whose signature shows every field, so that a recipe can read and override it by name."""

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from graftwork.errors import ConfigError, suggest
from graftwork.models.shape import Shape
from graftwork.models.weights.hf import family_named

ShapeFunction = Callable[..., Shape]


def published(function: ShapeFunction) -> ShapeFunction:
    """Give ``function(**overrides)`` the signature of all Shape fields, with its published values as defaults."""
    shape = function()
    hints = typing.get_type_hints(type(shape))
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(f.name, keyword, default=_default(shape, f.name), annotation=hints[f.name])
        for f in fields(shape)
    ]
    signature = inspect.Signature(parameters, return_annotation=type(shape))
    vars(function)["__signature__"] = signature
    function.__annotations__ = {**{p.name: p.annotation for p in parameters}, "return": type(shape)}
    return function


def _default(shape: Shape, name: str) -> object:
    # Shown as None where it follows from other fields: overriding hidden_size must move the head width too.
    derived = {
        "num_query_groups": shape.num_attention_heads,
        "kv_channels": shape.hidden_size // shape.num_attention_heads,
        "num_decoder_layers": shape.num_layers,
        "scale_output": shape.tie_embeddings,
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
    }
    value = getattr(shape, name)
    return None if name in derived and value == derived[name] else value


def said(shape: Shape) -> dict[str, object]:
    """Return the fields of ``shape`` that its class would not have without being told."""
    told = {one.name: (_default(shape, one.name), one.default) for one in fields(shape)}
    return {name: value for name, (value, default) in told.items() if value != default}


def shape_of(overrides: dict[str, object], **values: object) -> Shape:
    """Return Shape(**values) with ``overrides`` on top, as ``made``."""
    return made(Shape, values, overrides)


def made(kind: type[Shape], values: dict[str, object], overrides: dict[str, object]) -> Shape:
    """Return a shape of this kind with ``overrides`` on top of ``values``.

    Raises ConfigError naming the fields for a wrong name, and for a family that nobody reads or writes.
    """
    valid = [f.name for f in fields(kind)]
    for name in overrides:
        if name not in valid:
            raise ConfigError(f"{kind.__name__} has no field {name!r}; {suggest(name, valid)}")
    merged: dict[str, Any] = {**values, **overrides}
    shape = kind(**merged)
    family_named(shape.family)
    return shape
