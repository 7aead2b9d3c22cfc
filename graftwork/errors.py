"""Every user-facing error: one sentence that says what was wrong and what would be valid."""

import difflib
import reprlib
from collections.abc import Iterable
from pathlib import PurePath

_BRIEF = reprlib.Repr()
"""Looks at a few elements of a collection and at a few levels of it."""


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


def where_to_read(error: GraftworkError) -> str:
    """Return the section of the documentation on errors of this class: that of the class in this module."""
    public = next(kind for kind in type(error).__mro__ if kind.__module__ == __name__)
    return f"docs/troubleshooting.md#{public.__name__.lower()}"


def quoted(value: object, limit: int = 120, bare: bool = False) -> str:
    """Return ``value`` as an error quotes it: on one line, its middle cut out beyond ``limit`` characters.

    Whatever a file may hold goes through here: it can be of any length. ``bare`` leaves out quotation marks.
    """
    if not isinstance(value, (str, PurePath)):
        return _shortened(_BRIEF.repr(value), limit)
    shown = repr(_shortened(str(value), limit))
    return shown[1:-1] if bare else shown


_COMPARED = 2000
"""Most names that a wrong one is compared with; it takes a millisecond for twenty."""


def suggest(name: str, valid: Iterable[str], limit: int = 8) -> str:
    """Return ``did you mean ...`` for a near miss, else the list of valid names (at most ``limit``)."""
    # Names come from files too: a long one is compared by what is shown of it.
    names = sorted({quoted(one, bare=True) for one in valid})
    near = difflib.get_close_matches(quoted(name, bare=True), names[:_COMPARED], n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
    return f"valid: {shown}." if names else "there are none."


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 4) :]}"
