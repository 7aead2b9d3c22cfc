"""Named shapes: functions whose signature shows every field, so that a recipe can read and override it by name."""

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from graftwork.errors import ConfigError, suggest
from graftwork.models.shapes.shape import Shape

ShapeFunction = Callable[..., Shape]


def published(function: ShapeFunction) -> ShapeFunction:
    """Give ``function(**overrides)`` the signature of all Shape fields, with its published values as defaults."""
    shape = function()
    hints = typing.get_type_hints(Shape)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(f.name, keyword, default=_default(shape, f.name), annotation=hints[f.name])
        for f in fields(Shape)
    ]
    function.__signature__ = inspect.Signature(parameters, return_annotation=Shape)  # type: ignore[attr-defined]
    function.__annotations__ = {**{p.name: p.annotation for p in parameters}, "return": Shape}
    return function


def _default(shape: Shape, name: str) -> Any:
    # Shown as None where it follows from other fields: overriding hidden_size must move the head width too.
    derived = {
        "num_query_groups": shape.num_attention_heads,
        "kv_channels": shape.hidden_size // shape.num_attention_heads,
    }
    value = getattr(shape, name)
    return None if name in derived and value == derived[name] else value


def shape_of(overrides: dict[str, Any], **values: Any) -> Shape:
    """Return Shape(**values) with ``overrides`` on top; raises ConfigError naming the fields for a wrong name."""
    valid = [f.name for f in fields(Shape)]
    for name in overrides:
        if name not in valid:
            raise ConfigError(f"Shape has no field {name!r}; {suggest(name, valid)}")
    return Shape(**{**values, **overrides})
