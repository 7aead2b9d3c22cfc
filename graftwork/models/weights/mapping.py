"""Mapping: which Hugging Face tensors each megatron-core parameter of a model is made of."""

import re
from collections.abc import Iterator
from collections.abc import Mapping as ReadOnly
from dataclasses import dataclass, field
from itertools import groupby

from graftwork.errors import MatchError, suggest
from graftwork.models.weights.ops import Op

_LAYER = re.compile(r"^(encoder|decoder)\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\.local_experts\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Rule:
    """One core parameter <-> its Hugging Face tensors.

    ``{layer}`` and ``{expert}`` in the names stand for the layer and the expert, counted over the whole model.

    ``alias``: the same Hugging Face tensor is already written by another rule (tied output layer); ``only``: the layers
    that have such a parameter (None: all).
    """

    core: str
    hf: tuple[str, ...]
    op: Op
    alias: bool = False
    only: frozenset[int] | None = None

    def stands_in(self, layer: int) -> bool:
        """Tell whether a layer has such a parameter."""
        return self.only is None or layer in self.only

    @property
    def of_expert(self) -> bool:
        """Whether every expert of a layer has such a parameter."""
        return "{expert}" in self.core

    def at(self, layer: int, expert: int = 0) -> "Rule":
        """Return the rule for one layer, and for one expert if its names have a place for it."""
        names = tuple(name.format(layer=layer, expert=expert) for name in self.hf)
        return Rule(self.core.format(layer=layer, expert=expert), names, self.op, self.alias)


@dataclass(frozen=True)
class Stack:
    """A tensor [experts, rows, columns] that some checkpoints hold in place of a ``rule``'s tensors of every expert.

    Of each expert it has the rule's tensors one below the other; ``hf`` is its name, with ``{layer}``; ``parameter``:
    that of the parameter in the model that transformers builds.
    """

    hf: str
    rule: Rule
    parameter: str


@dataclass(frozen=True)
class Mapping:
    """All rules of one model, in its order; those of one stack's layers stand together.

    ``layers``: number of layers of each stack ("encoder", "decoder"); ``prefix``: leading part of Hugging Face names
    that some checkpoints leave out; ``ignored``: patterns of tensors that carry no weights (masks, rotary tables);
    ``twins``: a tensor that some checkpoints hold beside the one it is tied to, by its name; ``experts``: number of
    experts of a layer; ``renamed``: (pattern, replacement) for other names of the same tensors; ``stacks``: tensors
    that some checkpoints hold in place of every expert's.
    """

    family: str
    layers: dict[str, int]
    rules: tuple[Rule, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    twins: ReadOnly[str, str] = field(default_factory=dict)
    experts: int = 0
    renamed: tuple[tuple[str, str], ...] = ()
    stacks: tuple[Stack, ...] = ()

    def expanded(self) -> Iterator[Rule]:
        """Yield every rule of every layer, in model order."""
        for stack, rules in groupby(self.rules, lambda rule: _stack(rule.core)):
            if stack is None:
                yield from rules
                continue
            layered = tuple(rules)
            for layer in range(self.layers[stack]):
                yield from self._of_layer(layered, layer)

    def rule(self, core_name: str) -> Rule:
        """Return the rule of a global core parameter name; raises MatchError with near names."""
        found = _LAYER.match(core_name)
        stack, layer = (found.group(1), int(found.group(2))) if found else (None, 0)
        numbered = _EXPERT.search(core_name)
        expert = int(numbered.group(1)) if numbered else 0
        pattern = _EXPERT.sub("{expert}", _LAYER.sub(r"\1.layers.{layer}.", core_name))
        there = (stack is None or layer < self.layers[stack]) and (numbered is None or expert < self.experts)
        for rule in self.rules:
            if there and rule.core == pattern and rule.stands_in(layer):
                return rule.at(layer, expert)
        names = (rule.core for rule in self.rules)
        raise MatchError(f"no {self.family} parameter is called {core_name!r}; {suggest(pattern, names)}")

    def count(self) -> int:
        """Number of Hugging Face tensors, counted without listing them."""
        return sum(self._times(rule) * len(rule.hf) for rule in self.rules if not rule.alias)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model with its shape, each once, in model order."""
        return {name: shape for rule in self.expanded() for name, shape in zip(rule.hf, rule.op.shapes)}

    def canonical(self, hf_name: str) -> str | None:
        """The name as the rules spell it (prefix added), None for a tensor that carries no weights."""
        if any(re.search(pattern, hf_name) for pattern in self.ignored):
            return None
        for pattern, replacement in self.renamed:
            hf_name = re.sub(pattern, replacement, hf_name)
        known = {name.split(".", 1)[0] for rule in self.rules for name in rule.hf}
        known |= {name.split(".", 1)[0] for name in self.twins}
        return hf_name if hf_name.split(".", 1)[0] in known else self.prefix + hf_name

    def _of_layer(self, rules: tuple[Rule, ...], layer: int) -> Iterator[Rule]:
        for of_expert, some in groupby(rules, lambda rule: rule.of_expert):
            group = tuple(rule for rule in some if rule.stands_in(layer))
            for expert in range(self.experts if of_expert else 1):
                yield from (rule.at(layer, expert) for rule in group)

    def _times(self, rule: Rule) -> int:
        stack = _stack(rule.core)
        layers = 1 if stack is None else self.layers[stack] if rule.only is None else len(rule.only)
        return layers * (self.experts if rule.of_expert else 1)


def _stack(core: str) -> str | None:
    """The stack whose layers a rule is repeated over, None for one that stands once."""
    return core.partition(".")[0] if "{layer}" in core else None
