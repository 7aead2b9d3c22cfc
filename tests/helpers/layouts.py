"""Layouts by the short names that the tests' tables use."""

from typing import Any

from graftwork.layout import Layout


def layout_of(virtual_pipeline: int | None = None, **sizes: int) -> Layout:
    """Return the layout of ``tensor``, ``pipeline``, ``context`` and ``expert`` ranks."""
    named: dict[str, Any] = {f"{axis}_model_parallel_size": n for axis, n in sizes.items() if axis != "context"}
    if "context" in sizes:
        named["context_parallel_size"] = sizes["context"]
    return Layout(**named, virtual_pipeline_model_parallel_size=virtual_pipeline)
