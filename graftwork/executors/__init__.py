"""Where a recipe runs, and the launch that checks how it ended."""

from graftwork.executors.launch import launch
from graftwork.executors.local import local

__all__ = ["launch", "local"]
