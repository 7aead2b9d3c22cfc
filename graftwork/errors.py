"""Every user-facing error: one sentence that says what was wrong and what would be valid."""

import difflib
from collections.abc import Iterable


class GraftworkError(Exception):
    """Base of every error a user can cause; the command line prints it as one line and exits non-zero."""


class ConfigError(GraftworkError, ValueError):
    """A recipe field, option or argument has a value that cannot work."""


class MatchError(GraftworkError, ValueError):
    """A target, layer or adapter name matches nothing in the model."""


class ArtifactError(GraftworkError):
    """An adapter directory is missing, damaged, or belongs to another base model."""


class CheckpointError(GraftworkError):
    """A base checkpoint or a training state cannot be read or written."""


class DataError(GraftworkError, ValueError):
    """A data file or one of its rows is malformed."""


class ParallelismError(GraftworkError, ValueError):
    """The parallel sizes do not fit the model, the batch or the devices."""


class TrainingError(GraftworkError, RuntimeError):
    """Training went wrong in a way that must not pass silently (NaN loss, dead adapter, moved base)."""


class LaunchError(GraftworkError, RuntimeError):
    """A launched task failed, or could not be started."""


def suggest(name: str, valid: Iterable[str], limit: int = 8) -> str:
    """Return ``did you mean ...`` for a near miss, else the list of valid names (at most ``limit``)."""
    names = sorted(set(valid))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
    return f"valid: {shown}." if names else "there are none."
