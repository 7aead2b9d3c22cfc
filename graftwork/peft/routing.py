"""The routes of the microbatch that runs: bound around one run of a chunk, read by adapters.

A context variable, so that recomputation, which runs layers again while another microbatch is under way, reads the
routes of their own (``compat.recompute``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from graftwork.parallel.state import tp_rank, tp_size
from graftwork.routes import Routes

_ROUTES: ContextVar[Routes | None] = ContextVar("graftwork_routes", default=None)


@contextmanager
def routed(routes: Routes | None) -> Iterator[None]:
    """Send the rows of what runs inside the block by ``routes``; None: by those outside of it, where there are some.

    Without any, every adapter acts on all rows.
    """
    token = _ROUTES.set(_ROUTES.get() if routes is None else routes)
    try:
        yield
    finally:
        _ROUTES.reset(token)


@contextmanager
def at_positions(positions: Tensor, rows: int, length: int) -> Iterator[None]:
    """Inside the block run some positions (flat indices [n]) of ``rows`` of ``length`` tokens, as [n, 1, ...]."""
    routes = _ROUTES.get()
    with routed(None if routes is None else routes.at(positions, rows, length)):
        yield


def acts_on(adapter: str, x: Tensor) -> Tensor | None:
    """Return where ``adapter`` acts on ``x`` [s, b, ...], bool [s or 1, b, 1, ...]; None: everywhere.

    Under sequence parallelism ``x`` may hold this tensor-parallel rank's part of the sequence.
    """
    rows = acts_on_ids(adapter)
    if rows is None:
        return None
    tokens = rows.t()
    if len(tokens) not in (1, len(x)):
        tokens = tokens.chunk(tp_size())[tp_rank()]
    return tokens.reshape(*tokens.shape, *(1,) * (x.dim() - 2))


def acts_on_ids(adapter: str) -> Tensor | None:
    """Return where ``adapter`` acts on ids [b, s], bool [b, s or 1]; None: everywhere."""
    routes = _ROUTES.get()
    return None if routes is None else routes.acts(adapter)
