"""The script that launches: NeMo Run copies it beside the job and runs it again inside the task."""

import ast
import sys
from pathlib import Path
from types import FrameType

from graftwork.errors import ConfigError

_GUARD = "if __name__ == '__main__':"


def needs_script(task: str) -> bool:
    """Whether a task, as JSON, names something that the launching script defines.

    Raises ConfigError where the task could not find it, and where running the script again would launch again.
    """
    if '"__main__"' not in task:
        return False
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None:
        raise ConfigError(
            "the recipe uses something that is defined here; put it into a file and import it from there."
        )
    line = _line_of_launch(sys._getframe())
    if line is not None and not _is_guarded(Path(script).read_text(), line):
        raise ConfigError(
            f"the recipe uses something that {Path(script).name} defines, so the task runs this script once more; "
            f"put line {line}, which launches, under {_GUARD}"
        )
    return True


def _line_of_launch(frame: FrameType | None) -> int | None:
    """Return the line of the script's outermost level that is being run; None when it is not being run."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return frame.f_lineno
        frame = frame.f_back
    return None


def _is_guarded(script: str, line: int) -> bool:
    guards = [node for node in ast.parse(script).body if isinstance(node, ast.If) and "__name__" in ast.dump(node.test)]
    return any(node.lineno <= line <= (node.end_lineno or 0) for node in guards)
