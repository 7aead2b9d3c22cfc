"""Result files: written once, by the first rank, whole or not at all."""

import json
from collections.abc import Iterable, Mapping

from graftwork.atomic import atomic_write_text
from graftwork.parallel.collective import barrier, world_rank


def write_text(path: str, text: str) -> None:
    """Write ``text`` to ``path`` from global rank 0; every rank returns once it is there."""
    if world_rank() == 0:
        atomic_write_text(path, text)
    barrier()


def write_jsonl(path: str, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
