"""The adapters of one model: attached in list order, named, switched, merged and deleted."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graftwork.errors import ConfigError, MatchError, suggest
from graftwork.parallel.collective import agree, agreed
from graftwork.parallel.record import record_of
from graftwork.peft.adapter import Adapter, Birth
from graftwork.peft.asking import PromptFormat, learned
from graftwork.peft.merge import Candidate, fold, install, original_weights, originals, unmerge
from graftwork.peft.method import PEFT
from graftwork.peft.outline import Outline
from graftwork.peft.routing import routed
from graftwork.peft.sites import BaseTensor, Host, Site
from graftwork.peft.trained import DerivedTensor, LentTensor, TrainedTensor, check_free
from graftwork.peft.wrapper import graft, parameter_device, ungraft
from graftwork.routes import Routes
from graftwork.virtual_tokens import PromptLayout
from graftwork.ways import Way

_META = torch.device("meta")


@dataclass(frozen=True)
class Grafted:
    """One adapter module and the site it stands at."""

    site: Site
    adapter: Adapter


@dataclass(frozen=True)
class _Plan:
    """What a transform will change on this rank: modules to graft, tensors of the base to train."""

    grafts: list[Grafted]
    tensors: list[BaseTensor]

    def outline(self, name: str) -> Outline:
        """Describe it as that of adapter ``name``."""
        shapes = {f"{name}.{tensor.name}": record_of(tensor.parameter).sharding.shape for tensor in self.tensors}
        derived: list[str] = []
        for item in self.grafts:
            prefix = f"{name}.{item.site.name}"
            shapes |= {f"{prefix}.{k}": record_of(p).sharding.shape for k, p in item.adapter.named_parameters()}
            derived += [f"{prefix}.{key}" for key in item.adapter.extra_tensors()]
        return Outline(name, frozenset(item.site.name for item in self.grafts), shapes, derived)


class Stack:
    """All adapters of one model, by name, in the order in which they were added.

    What it trains are *tensors*: those of the adapter modules that it grafts, and those that the base lends.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.transforms: dict[str, PEFT] = {}
        self.grafted: dict[str, list[Grafted]] = {}
        self.lent: dict[str, list[LentTensor]] = {}
        self.prompt_formats: dict[str, PromptFormat] = {}
        self.frozen_tasks: dict[str, frozenset[str]] = {}
        self._prompts = PromptLayout()
        self._merged: set[str] = set()
        self._training: set[str] = set()
        self._off = 0
        self._base_flags: list[tuple[nn.Parameter, bool]] = []

    @property
    def host(self) -> Host:
        """The model as transforms see it, with the prompts attached so far."""
        return replace(self._host, prompts=self.layout)

    @property
    def layout(self) -> PromptLayout:
        """Virtual tokens of the attached prompts; none inside of a ``disabled`` block."""
        return PromptLayout(off=True) if self._off else self._prompts

    @layout.setter
    def layout(self, layout: PromptLayout) -> None:
        self._prompts = layout

    @property
    def prompts(self) -> PromptLayout:
        """Virtual tokens of the attached prompts, also inside of a ``disabled`` block."""
        return self._prompts

    @property
    def merged(self) -> bool:
        """Whether an adapter of the model is merged into the base."""
        return bool(self._merged)

    def add(self, transform: PEFT, trainable: bool = True, loaded: bool = False) -> None:
        """Attach one transform: find its sites, freeze the base, graft its adapters (``trainable`` or frozen).

        ``loaded``: its values are replaced at once, so that no tokenizer is needed for those that follow from a text.
        Raises MatchError when the name is taken, a target matches nothing or a tensor is trained by another; on any
        rank's error no rank is changed.
        """
        self.check_on()
        if transform.name in self.transforms:
            raise MatchError(
                f"The model already has an adapter named {transform.name!r}; give this {type(transform).__name__} "
                "another name or delete the other one first."
            )
        layout = self.layout.appended(transform.prompt_slots(self.layout.size))
        host = replace(self._host, prompts=layout, tokenize=_unasked if loaded else self._host.tokenize)
        plan = agreed(lambda: _planned(transform, host))
        self.layout = layout
        self._carry_out(plan, transform, trainable)

    def outlines(self, transforms: Sequence[PEFT]) -> list[Outline]:
        """Return what each transform trains on this rank, as attached or as it would be, without memory for it.

        Collective. Raises, on all ranks, what ``add`` would raise.
        """
        found, layout = [], self.layout
        for transform in transforms:
            name = transform.name
            if repr(self.transforms.get(name)) == repr(transform):
                plan = _Plan(self.grafted[name], [lent.tensor for lent in self.lent[name]])
            else:
                layout = layout.without(name).appended(transform.prompt_slots(layout.size))
                plan = _sketched(transform, replace(self._host, prompts=layout))
            found.append(plan.outline(name))
        return found

    def sites(self, name: str) -> set[str]:
        """Return the names of the modules that adapter ``name`` stands at on this rank."""
        return {item.site.name for item in self.grafted[name]}

    def remove(self, name: str) -> None:
        """Take adapter ``name`` off the model; the base and other adapters keep every bit.

        Removing the last adapter, if it trains, unfreezes the base as far as the first one froze it. Collective.
        """
        self.known([name])
        self.check_on()
        if self.merged:
            raise MatchError(f"{self.transforms[name]} cannot be deleted while adapters are merged; unmerge first.")
        # A pipeline stage may hold none of it, and must thaw its part of the base all the same.
        trained = self._host.everywhere(t.key for t in self.tensors(name) if t.parameter.requires_grad)
        self._detach(name)
        if not self.transforms:
            for parameter, flag in self._base_flags if trained else []:
                parameter.requires_grad_(flag)
            self._base_flags = []

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take every adapter added inside the block off again, and restore what trains, when the block raises."""
        before, done = set(self.transforms), False
        flags = [(p, p.requires_grad) for chunk in self._host.chunks for p in chunk.parameters()]
        try:
            yield
            done = True
        finally:
            if not done:
                for name in set(self.transforms) - before:
                    self._detach(name)
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the model its base inside the block, merged weights included; on exit every adapter is as it was."""
        states, first = [(a, a.enabled) for a in self.adapters()], not self._off
        with original_weights(self._host.chunks if first else []), _shown_as_born(self._lent() if first else []):
            self._off += 1
            for adapter, _ in states:
                adapter.enabled = False
            try:
                yield
            finally:
                self._off -= 1
                for adapter, enabled in states:
                    adapter.enabled = enabled

    @contextmanager
    def only(self, names: Collection[str]) -> Iterator[None]:
        """Make the model its base with the named adapters, none of them merged, inside the block."""
        prompts, off = self._prompts, self._off
        states = [(adapter, adapter.enabled, adapter.merged) for adapter in self.adapters()]
        other = [t for name, lent in self.lent.items() for t in lent if (name in names) == bool(off)]
        with original_weights([] if off else self._host.chunks), _shown_as_born(other):
            self._prompts, self._off = PromptLayout(tuple(s for s in prompts.slots if s.name in names)), 0
            for name, items in self.grafted.items():
                for item in items:
                    item.adapter.enabled, item.adapter.merged = name in names, False
            try:
                yield
            finally:
                self._prompts, self._off = prompts, off
                for adapter, enabled, merged in states:
                    adapter.enabled, adapter.merged = enabled, merged

    def twins(self, transform: PEFT) -> list[Grafted]:
        """Return what ``transform`` builds at the sites of the attached adapter of its name, on the meta device."""
        host, name = replace(self._host, prompts=self._prompts, tokenize=_unasked), transform.name
        births = [(item.site, Birth(host.seed, name, item.site.name, _META)) for item in self.grafted[name]]
        return [Grafted(site, transform.build(site, birth, host).eval()) for site, birth in births]

    def newcomer(self, transform: PEFT) -> tuple[list[Grafted], PromptLayout]:
        """Return what ``transform`` builds at the sites that it finds itself, on the meta device, and its own prompts.

        Collective. Raises MatchError unless these are the sites of the attached adapter of its name.
        """
        layout, name = PromptLayout().appended(transform.prompt_slots(0)), transform.name
        items = _sketched(transform, replace(self._host, prompts=layout)).grafts
        found, own = {item.site.name for item in items}, self.sites(name)
        differing = sorted(found ^ own)
        problem = f"{transform} stands at other modules than {name!r}, such as {differing[0]}" if differing else None
        agree(None if problem is None else MatchError(problem))
        for item in items:
            item.adapter.eval()
        return items, layout

    @contextmanager
    def standing_in(self, others: Mapping[str, list[Grafted]], prompts: PromptLayout | None = None) -> Iterator[None]:
        """Put other adapter modules in the place of the named adapters' inside the block; the own ones stay as are.

        ``prompts``: the virtual tokens that there are meanwhile; None: those of the own ones.
        """
        own, layout = {name: self.grafted[name] for name in others}, self._prompts
        self._put(others)
        self._prompts = layout if prompts is None else prompts
        try:
            yield
        finally:
            self._prompts = layout
            self._put(own)

    @contextmanager
    def routed(self, routes: Routes | None) -> Iterator[None]:
        """Let each adapter act only where ``routes`` send a row to it, inside the block; None: as outside of it.

        Raises MatchError for a name that is not attached, or an adapter that cannot tell rows apart.
        """
        if routes is not None:
            self.check_ways(routes.ways)
        with routed(routes):
            yield

    def check_ways(self, ways: Collection[Way]) -> None:
        """Raise MatchError unless rows can be sent these ways."""
        named = [way for way in ways if way is not None]
        self.known(sorted({name for way in named for name in way}))
        for name, transform in self.transforms.items():
            why = self._why_everywhere(name)
            if why and not all(name in way for way in named):
                raise MatchError(f"{transform} cannot act on some rows only: {why}; send all rows to it, or delete it.")

    def merge(self, names: Sequence[str] | None = None) -> None:
        """Fold adapters into the base weights (in fp32, then cast); ``names`` None means all.

        Raises MatchError for a method that cannot be merged, or a weight that would not be finite, on every rank and
        before anything is changed.
        """
        self.check_on()
        chosen = self.known(names)
        candidates = [Candidate(str(self.transforms[n]), g.site, g.adapter) for n in chosen for g in self.grafted[n]]
        install(agreed(lambda: fold(candidates, self._host.chunks)))
        self._merged |= set(chosen)

    def unmerge(self) -> None:
        """Give every merged weight back bit for bit."""
        self.check_on()
        unmerge(self._host.chunks)
        self._merged = set()

    def check_on(self) -> None:
        """Raise MatchError inside of a ``disabled`` block, where nothing may be changed."""
        if self._off:
            raise MatchError("Adapters are switched off here; leave the adapters_disabled() block first.")

    def adapters(self, name: str | None = None) -> Iterator[Adapter]:
        """Yield the adapter modules on this rank, of one name or of all."""
        for key, items in self.grafted.items():
            if name in (None, key):
                yield from (item.adapter for item in items)

    def tensors(self, name: str) -> Iterator[TrainedTensor]:
        """Yield the tensors on this rank that adapter ``name`` trains (or would, were it not frozen)."""
        for item in self.grafted[name]:
            for key, parameter in item.adapter.named_parameters():
                yield TrainedTensor(name, item.site.name, key, parameter, parameter.detach())
        merged = originals(self._host.chunks) if self.merged and self.lent[name] else {}
        for lent in self.lent[name]:
            site, _, key = lent.tensor.name.rpartition(".")
            shown = merged.get(id(lent.parameter), lent.parameter.detach())
            yield TrainedTensor(name, site, key, lent.parameter, lent.held if self._off else shown)

    def derived(self, name: str) -> Iterator[DerivedTensor]:
        """Yield the tensors that follow from those of adapter ``name`` and are saved beside them."""
        for item in self.grafted[name]:
            for key, value in item.adapter.extra_tensors().items():
                yield DerivedTensor(f"{name}.{item.site.name}.{key}", value, item.site.in_expert)

    def folded(self, name: str) -> bool:
        """Tell whether values of ``name`` stand inside merged weights, so that they cannot be changed."""
        return name in self._merged or (self.merged and bool(self.lent[name]))

    def train_only(self, names: Sequence[str]) -> None:
        """Make exactly the named adapters trainable and freeze the others."""
        chosen = self.known(names)
        for name in self.transforms:
            self._set_trainable(name, name in chosen)

    def freeze(self, name: str) -> None:
        """Stop the training of adapter ``name``."""
        self._set_trainable(name, False)

    def train_tasks(self, name: str, tasks: Collection[str]) -> None:
        """Make exactly these tasks of adapter ``name`` trainable and freeze its others."""
        for tensor in self.tensors(name):
            _, task, _ = tensor.name.split(".")
            tensor.parameter.requires_grad_(task in tasks)
        (self._training.add if tasks else self._training.discard)(name)
        self.frozen_tasks[name] = frozenset(self.transforms[name].tasks or ()) - set(tasks)

    def training_tasks(self) -> dict[str, list[str]]:
        """Return, by adapter, the tasks that train; adapters without tasks are left out."""
        trained = {name: transform.tasks for name, transform in self.transforms.items() if name in self._training}
        return {
            name: [task for task in tasks if task not in self.frozen_tasks.get(name, ())]
            for name, tasks in trained.items()
            if tasks is not None
        }

    def known(self, names: Sequence[str] | None) -> list[str]:
        """Return ``names`` without repetitions, all names for None; raises MatchError for one that is not attached."""
        for name in names or ():
            if name not in self.transforms:
                raise MatchError(f"The model has no adapter {name!r}; {suggest(name, self.transforms)}")
        return list(self.transforms if names is None else dict.fromkeys(names))

    def prompt_format(self, given: Collection[str] = (), way: Way = None) -> dict[str, Any]:
        """Return how the adapters that act on rows of this ``way`` were trained to be asked (templates, BOS, EOS).

        The keys ``given`` are left out. Raises ConfigError when two of them were trained with different values.
        """
        found: dict[str, object] = {}
        source: dict[str, str] = {}
        for name, known in self.prompt_formats.items():
            for key in known.keys() - set(given) if way is None or name in way else ():
                if found.setdefault(key, known[key]) != known[key]:
                    raise ConfigError(
                        f"adapters {source[key]!r} and {name!r} were trained with different values of {key}: "
                        f"{found[key]!r} and {known[key]!r}; say which one to use."
                    )
                source.setdefault(key, name)
        return found

    def remember_prompt_format(self, prompt: Mapping[str, object]) -> None:
        """Note, for every adapter that trains, how the training rows are put to the model.

        Raises ConfigError where tasks that do not train would have to be asked in another way than they were trained.
        """
        trained, found = self.training_tasks(), {}
        for name in self._training:
            before, frozen = self.prompt_formats.get(name), sorted(self.frozen_tasks.get(name, ()))
            found[name] = learned(before, prompt, frozen, trained.get(name, ()), str(self.transforms[name]))
        self.prompt_formats |= found

    def _carry_out(self, plan: _Plan, transform: PEFT, trainable: bool) -> None:
        if not self.transforms:
            self._base_flags = [(p, p.requires_grad) for chunk in self._host.chunks for p in chunk.parameters()]
            for chunk in self._host.chunks:
                chunk.requires_grad_(False)
        for item in plan.grafts:
            item.adapter.derive()
            item.adapter.train(item.site.module.training)
            graft(self._host.chunks[item.site.chunk], item.site.path, transform.name, item.adapter)
        self.transforms[transform.name] = transform
        self.grafted[transform.name] = plan.grafts
        self.lent[transform.name] = [LentTensor(tensor, transform.name) for tensor in plan.tensors]
        self._set_trainable(transform.name, trainable)

    def _put(self, items: Mapping[str, list[Grafted]]) -> None:
        for name, grafts in items.items():
            for item in grafts:
                graft(self._host.chunks[item.site.chunk], item.site.path, name, item.adapter)
        self.grafted |= items

    def _detach(self, name: str) -> None:
        for item in self.grafted.pop(name):
            ungraft(self._host.chunks[item.site.chunk], item.site.path, name)
        for lent in self.lent.pop(name):
            lent.give_back()
        del self.transforms[name]
        self.prompt_formats.pop(name, None)
        self.frozen_tasks.pop(name, None)
        self._training.discard(name)
        self.layout = self.layout.without(name)

    def _set_trainable(self, name: str, trainable: bool) -> None:
        for tensor in self.tensors(name):
            tensor.parameter.requires_grad_(trainable)
        self.frozen_tasks.pop(name, None)
        (self._training.add if trainable else self._training.discard)(name)  # also where a rank holds none of it

    def _why_everywhere(self, name: str) -> str | None:
        """Return why an adapter acts on all rows or on none, None for one that tells rows apart."""
        if name in self._merged:
            return "it is merged into the base (unmerge it first)"
        if self.lent[name]:
            return "it trains tensors of the base itself"
        if any(item.site.in_expert for item in self.grafted[name]):
            return "inside of experts tokens have lost their rows"
        return None

    def _lent(self) -> list[LentTensor]:
        return [lent for tensors in self.lent.values() for lent in tensors]


def _sketched(transform: PEFT, host: Host) -> _Plan:
    return agreed(lambda: _planned(transform, replace(host, tokenize=_unasked), torch.device("meta")))


def _unasked(text: str) -> list[int]:
    """Stand for a tokenizer where the values that follow from a text are not wanted."""
    return [0]


def _planned(transform: PEFT, host: Host, device: torch.device | None = None) -> _Plan:
    """Look for sites and tensors, which asks all ranks and is refused on all or on none; build what goes there.

    ``device``: where its tensors are born, None: where the base's are.
    """
    sites, tensors = transform.find(host), transform.selects(host)
    check_free(tensors, originals(host.chunks), str(transform))
    grafts = []
    for site in sites:
        place = device or parameter_device(host.chunks[site.chunk])
        birth = Birth(host.seed, transform.name, site.name, place)
        grafts.append(Grafted(site, transform.build(site, birth, host)))
    return _Plan(grafts, tensors)


@contextmanager
def _shown_as_born(lent: Sequence[LentTensor]) -> Iterator[None]:
    """Exchange trained values of the base's own tensors for the original ones inside the block."""
    for tensor in lent:
        tensor.exchange()
    try:
        yield
    finally:
        for tensor in lent:
            tensor.exchange()
