"""What a stack trains in a model: sites, shapes and parameters, as numbers and as text."""

from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

from graftwork.parallel.collective import all_gather_objects
from graftwork.parallel.record import record_of
from graftwork.parallel.state import ep_group, pp_group
from graftwork.peft.stack import Stack


class OfSite(Protocol):
    """What is told of one adapter at one site."""

    @property
    def site(self) -> str:
        """Global name of the site."""
        ...

    @property
    def adapter(self) -> str:
        """Name of the adapter."""
        ...


S = TypeVar("S", bound=OfSite)


@dataclass(frozen=True)
class SiteReport:
    """One adapter at one site: global site name, adapter name, method, full tensor shapes, parameter count."""

    site: str
    adapter: str
    method: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Number of parameters, un-sharded."""
        return sum(prod(shape) for shape in self.shapes.values())


def sites(stack: Stack) -> list[SiteReport]:
    """Return every site of the whole model (all pipeline stages and experts) with what is trained there, in order."""
    found = [report for name in stack.transforms for report in _sites_of(stack, name)]
    return everywhere(found)


def everywhere(found: list[S]) -> list[S]:
    """Return what the ranks have found of every site, once: over all pipeline stages and experts, in their order."""
    for group in (pp_group(), ep_group()):
        found = [one for part in all_gather_objects(found, group) for one in part]
    return list({(one.adapter, one.site): one for one in found}.values())


def as_text(stack: Stack, total_parameters: int, limit: int = 12) -> str:
    """Return a table of the sites (``limit`` shown) and a line with trainable count and percentage."""
    rows = sites(stack)
    width = max((len(r.site) for r in rows), default=4)
    lines = [f"{'site':<{width}}  {'adapter':<18} {'parameters':>12}  shapes"]
    for row in rows[:limit]:
        shapes = ", ".join(f"{k} {list(v)}" for k, v in row.shapes.items())
        lines.append(f"{row.site:<{width}}  {row.adapter:<18} {row.parameters:>12,}  {shapes}")
    if len(rows) > limit:
        lines.append(f"... {len(rows) - limit} more sites")
    added = sum(r.parameters for r in rows)
    share = 100 * added / max(total_parameters, 1)
    lines.append(f"{len(rows)} sites, {added:,} adapter parameters, {share:.3f} % of the base's {total_parameters:,}")
    return "\n".join(lines)


def _sites_of(stack: Stack, name: str) -> list[SiteReport]:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in stack.tensors(name):
        shapes.setdefault(tensor.site, {})[tensor.name] = record_of(tensor.parameter).sharding.shape
    method = type(stack.transforms[name]).__name__
    return [SiteReport(site, name, method, found) for site, found in shapes.items()]
