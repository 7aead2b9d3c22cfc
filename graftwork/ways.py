"""Ways: which adapters act on a row, as data, templates and generation name them."""

from collections.abc import Sequence

Way = frozenset[str] | None
"""Names of the adapters that act on a row: none of them when it is empty, every attached one for None."""

Named = str | Sequence[str] | None
"""How a user names them: one adapter, several, or None (as well as an empty name) for the base alone."""


def way(named: Named) -> frozenset[str]:
    """Return the adapters that ``named`` means."""
    return frozenset(name for name in ([named] if isinstance(named, str) else named or ()) if name)
