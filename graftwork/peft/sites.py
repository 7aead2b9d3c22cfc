"""Finding sites: which modules of a megatron-core model a transform wraps, and which of its tensors it trains.

Names are *global*: the layer index of ``decoder.layers.N`` counts over all pipeline stages and the expert index over
all expert-parallel ranks, so a site has one name in every layout.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from graftwork.core.records import EMBEDDING
from graftwork.errors import MatchError, suggest
from graftwork.parallel.collective import all_gather_objects
from graftwork.parallel.names import global_name, in_expert
from graftwork.parallel.record import record_of
from graftwork.parallel.state import ep_group, pp_group
from graftwork.peft.wrapper import innermost
from graftwork.virtual_tokens import PromptLayout

Layers = Sequence[int] | Mapping[str, Sequence[int]] | None
"""Selected layers: the same of every part of the model, some of each named part and none of the others, or all."""

_IN_LAYER = re.compile(r"(?:(\w+)\.)?\blayers\.(\d+)(?:\.(.+))?$")


@dataclass(frozen=True)
class Place:
    """A place in a model: ``name`` is the same in every layout, ``what`` says in a sentence what stands there."""

    name: str
    what: ClassVar[str] = "module"

    @property
    def leaf(self) -> str:
        """The last part of the name, e.g. ``linear_qkv``."""
        return self.name.rpartition(".")[2]

    @property
    def part(self) -> str | None:
        """The part of the model whose layers these are, ``decoder`` or ``encoder``; None outside the layers."""
        return self._in_layer[0]

    @property
    def layer(self) -> int | None:
        """Global index of the transformer layer within its part, or None outside the layers."""
        index = self._in_layer[1]
        return None if index is None else int(index)

    @property
    def inside(self) -> str | None:
        """The path below the layer, e.g. ``self_attention.linear_qkv``; None for a layer itself and outside of them."""
        return self._in_layer[2]

    @property
    def in_expert(self) -> bool:
        """Whether it belongs to one expert of a mixture."""
        return in_expert(self.name)

    @property
    def _in_layer(self) -> tuple[str | None, str | None, str | None]:
        found = _IN_LAYER.search(self.name)
        return (found.group(1), found.group(2), found.group(3)) if found else (None, None, None)


P = TypeVar("P", bound=Place)


@dataclass(frozen=True)
class Site(Place):
    """One module to wrap: ``path`` in its model ``chunk``, ``module`` the bare base."""

    path: str
    module: nn.Module
    chunk: int = 0


@dataclass(frozen=True)
class BaseTensor(Place):
    """One parameter of the base; a tied copy on another pipeline stage goes by the name of the tensor it copies."""

    parameter: nn.Parameter
    what: ClassVar[str] = "tensor"


@dataclass(frozen=True)
class Host:
    """A model to adapt, as transforms see it.

    ``chunks`` are this rank's megatron-core modules (several under virtual pipelining), ``config`` their
    TransformerConfig, ``vocab_size`` the real (un-padded) vocabulary, ``seed`` fixes every adapter's initial values.
    ``depths`` is the number of layers of each part; None: one decoder of ``config.num_layers``. ``tokenize`` returns
    the ids of a text, without BOS and EOS; None where there is no tokenizer.
    """

    chunks: Sequence[nn.Module]
    config: TransformerConfig
    vocab_size: int
    seed: int
    prompts: PromptLayout = field(default_factory=PromptLayout)
    depths: Mapping[str, int] | None = None
    tokenize: Callable[[str], list[int]] | None = None

    def sites(self) -> list[Site]:
        """Return every module that may be wrapped: all but the insides of adapters."""
        return [
            Site(global_name(root, path), path, innermost(module), index)
            for index, root in enumerate(self.chunks)
            for path, module in root.named_modules()
            if path and not _in_adapter(path)
        ]

    def tensors(self) -> list[BaseTensor]:
        """Return every parameter of the base that this rank holds."""
        return [
            BaseTensor(EMBEDDING if record_of(parameter).copy else global_name(root, path), parameter)
            for root in self.chunks
            for path, parameter in root.named_parameters()
            if not _in_adapter(path)
        ]

    def select(
        self, places: Iterable[P], patterns: Sequence[str], layers: Layers, who: str, names: "Naming | None" = None
    ) -> list[P]:
        """Return the places that the patterns name in the selected layers; every pattern must match.

        ``names`` tells whether a pattern names a place, by default as ``matches`` does. Raises MatchError on every rank
        when a pattern matches nothing in the whole model, or a layer does not exist.
        """
        depths = {"decoder": self.config.num_layers} if self.depths is None else self.depths
        return select(places, patterns, layers, depths, who, matches if names is None else names)

    def everywhere(self, names: Iterable[str]) -> list[str]:
        """Return the union of ``names`` over the whole model: all pipeline stages and experts."""
        return sorted(union(names))


def matches(pattern: str, name: str) -> bool:
    """Tell whether ``pattern`` names ``name``: whole trailing parts, or a ``*`` pattern over the full name.

    ``layers.1.mlp`` does not match ``layers.10.mlp``; ``*.layers.0.*`` works as in NeMo.
    """
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{name}".endswith(f".{pattern}")


Naming = Callable[[str, str], bool]
"""Whether a pattern (first) means a name (second)."""


def select(
    places: Iterable[P],
    patterns: Sequence[str],
    layers: Layers,
    depths: Mapping[str, int],
    who: str,
    names: Naming = matches,
) -> list[P]:
    """Return the places that a pattern names and whose layer is selected; ``depths`` counts the layers of each part.

    Raises MatchError on every rank when a pattern matches nothing in the whole model, or a layer does not
    exist; near names are listed.
    """
    candidates = list(places)
    chosen_layers = _layers_by_part(layers, depths, who)
    chosen = [p for p in candidates if _selected(p, chosen_layers) and any(names(w, p.name) for w in patterns)]
    hit = union(w for w in patterns if any(names(w, p.name) for p in chosen))
    known, what = union(_words(candidates)), next((p.what for p in candidates), Place.what)
    for pattern in patterns:
        if pattern not in hit:
            where = "" if layers is None else f" in layers {layers if isinstance(layers, Mapping) else list(layers)}"
            raise MatchError(
                f"{who}: target {pattern!r} matches no {what}{where}; {suggest(pattern.split('.')[-1], known)}"
            )
    return chosen


def union(names: Iterable[str]) -> set[str]:
    """Return the union of ``names`` over all pipeline stages and experts: what the whole model has."""
    found = set(names)
    for group in (pp_group(), ep_group()):
        found = {name for part in all_gather_objects(sorted(found), group) for name in part}
    return found


def _words(places: Iterable[Place]) -> Iterable[str]:
    """Yield what a mistyped pattern is compared with: modules by their own name, tensors by their module's too."""
    for place in places:
        yield place.leaf
        if isinstance(place, BaseTensor):
            yield place.name.split(".")[-2]


def _in_adapter(path: str) -> bool:
    return "adapters" in path.split(".")


def _selected(place: Place, layers: Mapping[str, Sequence[int]] | None) -> bool:
    return layers is None or (place.layer is not None and place.layer in layers.get(place.part or "", ()))


def _layers_by_part(layers: Layers, depths: Mapping[str, int], who: str) -> dict[str, Sequence[int]] | None:
    """Return the selected layers of each part; a plain selection holds for every part that is deep enough."""
    if layers is None:
        return None
    if isinstance(layers, Mapping):
        for part in layers:
            if part not in depths:
                raise MatchError(f"{who}: layers names {part!r}; {suggest(part, depths)}")
            _check_layers(layers[part], depths[part], who)
        return dict(layers)
    _check_layers(layers, max(depths.values()), who)
    return dict.fromkeys(depths, layers)


def _check_layers(layers: Sequence[int], depth: int, who: str) -> None:
    for layer in layers:
        if not 0 <= layer < depth:
            raise MatchError(f"{who}: layers has {layer}, but the model's layers are 0 to {depth - 1}.")
    if not layers:
        raise MatchError(f"{who}: layers is an empty list; leave it out for all {depth} layers.")
