"""The adapters of one model: attached in list order, named, switched, merged and deleted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from graftwork.compat.collective import agree
from graftwork.errors import GraftworkError, MatchError, suggest
from graftwork.peft.adapted import graft, parameter_device, ungraft
from graftwork.peft.adapter import Adapter, Birth
from graftwork.peft.host import Host
from graftwork.peft.match import Site
from graftwork.peft.merge import merge, unmerge
from graftwork.peft.transform import PEFT
from graftwork.virtual_tokens import PromptLayout


@dataclass(frozen=True)
class Grafted:
    """One adapter module and the site it stands at."""

    site: Site
    adapter: Adapter

    @property
    def root(self) -> str:
        """Global key prefix of the adapter's tensors below its name."""
        return self.site.name


class Stack:
    """All adapters of one model, by name, in the order in which they were added."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.transforms: dict[str, PEFT] = {}
        self.grafted: dict[str, list[Grafted]] = {}
        self.layout = PromptLayout()
        self.merged = False
        self._frozen = False

    @property
    def host(self) -> Host:
        """The model as transforms see it, with the prompts attached so far."""
        return replace(self._host, prompts=self.layout)

    def add(self, transform: PEFT, trainable: bool = True) -> None:
        """Attach one transform: find its sites, freeze the base, graft its adapters (``trainable`` or frozen).

        Raises MatchError when the name is taken or a target matches nothing; on any rank's error no rank is changed.
        """
        if transform.name in self.transforms:
            raise MatchError(
                f"The model already has an adapter named {transform.name!r}; give this {type(transform).__name__} "
                "another name or delete the other one first."
            )
        before, error, built = self.layout, None, []
        self.layout = self.layout.appended(transform.prompt_slots(self.layout.size))
        try:
            built = self._build(transform)
        except GraftworkError as refused:
            error = refused
        try:
            agree(error)
        except GraftworkError:
            self.layout = before
            raise
        self._graft(transform, built, trainable)

    def remove(self, name: str) -> None:
        """Take adapter ``name`` off the model; the base and other adapters are untouched."""
        self._known(name)
        if self.merged:
            raise MatchError(f"Adapter {name!r} is merged into the base; unmerge before deleting it.")
        for item in self.grafted.pop(name):
            ungraft(self._host.chunks[item.site.chunk], item.site.path, name)
        del self.transforms[name]
        self.layout = PromptLayout(tuple(s for s in self.layout.slots if s.name != name))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch every adapter off inside the block and restore each one's state on exit."""
        was_merged, layout = self.merged, self.layout
        states = [(a, a.enabled) for a in self.adapters()]
        if was_merged:
            self.unmerge()
        self.layout = PromptLayout()
        for adapter, _ in states:
            adapter.enabled = False
        try:
            yield
        finally:
            self.layout = layout
            for adapter, enabled in states:
                adapter.enabled = enabled
            if was_merged:
                self.merge()

    def merge(self, names: Sequence[str] | None = None) -> None:
        """Fold adapters into the base weights (in fp32, then cast); ``names`` None means all.

        Raises MatchError for a method that cannot be merged, before anything is changed.
        """
        chosen = list(self.transforms) if names is None else list(names)
        for name in chosen:
            self._known(name)
        merge([(n, g.site, g.adapter) for n in chosen for g in self.grafted[n]], self._host.chunks)
        self.merged = any(a.merged for a in self.adapters())

    def unmerge(self) -> None:
        """Give every merged weight back bit for bit."""
        unmerge(self._host.chunks)
        self.merged = False

    def adapters(self, name: str | None = None) -> Iterator[Adapter]:
        """Yield the adapter modules on this rank, of one name or of all."""
        for key, items in self.grafted.items():
            if name in (None, key):
                yield from (item.adapter for item in items)

    def named_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (global tensor name, parameter) of one adapter on this rank: ``<site>.<tensor>``."""
        for item in self.grafted[name]:
            for key, parameter in item.adapter.named_parameters():
                yield f"{item.root}.{key}", parameter

    def train_only(self, names: Sequence[str]) -> None:
        """Make exactly the named adapters trainable and freeze the others."""
        for name in names:
            self._known(name)
        for name in self.transforms:
            self._set_trainable(name, name in names)

    def _build(self, transform: PEFT) -> list[Grafted]:
        host = self.host
        built = []
        for site in transform.find(host):
            birth = Birth(host.seed, transform.name, site.name, parameter_device(host.chunks[site.chunk]))
            built.append(Grafted(site, transform.build(site, birth, host)))
        return built

    def _graft(self, transform: PEFT, built: list[Grafted], trainable: bool) -> None:
        if not self._frozen:
            for chunk in self._host.chunks:
                chunk.requires_grad_(False)
            self._frozen = True
        for item in built:
            item.adapter.train(item.site.module.training)
            graft(self._host.chunks[item.site.chunk], item.site.path, transform.name, item.adapter)
        self.transforms[transform.name] = transform
        self.grafted[transform.name] = built
        self._set_trainable(transform.name, trainable)

    def _set_trainable(self, name: str, trainable: bool) -> None:
        for adapter in self.adapters(name):
            adapter.requires_grad_(trainable)

    def _known(self, name: str) -> None:
        if name not in self.transforms:
            raise MatchError(f"The model has no adapter {name!r}; {suggest(name, self.transforms)}")
