"""Finding sites: which modules of a megatron-core model a transform wraps.

Names are *global*: the layer index of ``decoder.layers.N`` counts over all pipeline stages and the expert index over
all expert-parallel ranks, so a site has one name in every layout.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from graftwork.errors import MatchError, suggest
from graftwork.parallel.collective import all_gather_objects
from graftwork.parallel.names import global_name
from graftwork.parallel.state import ep_group, pp_group
from graftwork.peft.wrapper import innermost


@dataclass(frozen=True)
class Site:
    """One module to wrap: ``path`` in its model chunk, ``name`` the same in every layout, ``module`` the bare base."""

    path: str
    name: str
    module: nn.Module
    chunk: int = 0

    @property
    def leaf(self) -> str:
        """The last part of the name, e.g. ``linear_qkv``."""
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """Global index of the transformer layer, or None outside the layers."""
        found = re.search(r"\blayers\.(\d+)", self.name)
        return int(found.group(1)) if found else None

    @property
    def in_expert(self) -> bool:
        """Whether the module belongs to one expert of a mixture."""
        return ".local_experts." in self.name


def modules_of(chunks: Sequence[nn.Module]) -> list[Site]:
    """List every module of the model's chunks except adapters' insides, as sites."""
    return [
        Site(path, global_name(root, path), innermost(module), index)
        for index, root in enumerate(chunks)
        for path, module in root.named_modules()
        if path and "adapters" not in path.split(".")
    ]


def matches(pattern: str, name: str) -> bool:
    """Tell whether ``pattern`` names ``name``: whole trailing parts, or a ``*`` pattern over the full name.

    ``layers.1.mlp`` does not match ``layers.10.mlp``; ``*.layers.0.*`` works as in NeMo.
    """
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{name}".endswith(f".{pattern}")


def select(
    sites: Iterable[Site], patterns: Sequence[str], layers: Sequence[int] | None, num_layers: int, who: str
) -> list[Site]:
    """Return the sites that a pattern names and whose layer is selected.

    Raises MatchError on every rank when a pattern matches nothing in the whole model, or a layer does not
    exist; near names are listed.
    """
    candidates = list(sites)
    _check_layers(layers, num_layers, who)
    chosen = [
        s for s in candidates if (layers is None or s.layer in layers) and any(matches(p, s.name) for p in patterns)
    ]
    hit = union(p for p in patterns if any(matches(p, s.name) for s in chosen))
    leaves = union(s.leaf for s in candidates)
    for pattern in patterns:
        if pattern not in hit:
            where = "" if layers is None else f" in layers {list(layers)}"
            raise MatchError(
                f"{who}: target {pattern!r} matches no module{where}; {suggest(pattern.split('.')[-1], leaves)}"
            )
    return chosen


def union(names: Iterable[str]) -> set[str]:
    """Return the union of ``names`` over all pipeline stages and experts: what the whole model has."""
    found = set(names)
    for group in (pp_group(), ep_group()):
        found = {name for part in all_gather_objects(sorted(found), group) for name in part}
    return found


def _check_layers(layers: Sequence[int] | None, num_layers: int, who: str) -> None:
    for layer in layers or ():
        if not 0 <= layer < num_layers:
            raise MatchError(f"{who}: layers has {layer}, but the model's layers are 0 to {num_layers - 1}.")
    if layers is not None and not layers:
        raise MatchError(f"{who}: layers is an empty list; leave it out for all {num_layers} layers.")
