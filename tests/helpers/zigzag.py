"""A context-parallel rank's part of a whole tensor, packed rows included."""

from torch import Tensor

from graftwork.core.segments import Segment, row_positions


def local_rows(whole: Tensor, dim: int, rank: int, size: int, row: list[Segment] | None = None) -> Tensor:
    """Return this rank's zig-zag part of ``whole`` along ``dim``; ``row`` lists the segments of a packed row."""
    if size == 1:
        return whole
    row = row or [Segment(0, whole.shape[dim])]
    return whole.index_select(dim, row_positions(row, rank, size).to(whole.device))
