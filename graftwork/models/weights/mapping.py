"""Mapping: which Hugging Face tensors each megatron-core parameter of a family is made of."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from graftwork.errors import MatchError, suggest
from graftwork.models.weights.ops import Op
from graftwork.parallel.sharding import Sharding

LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """One core parameter <-> its Hugging Face tensors; ``{layer}`` in the names stands for the global layer index.

    ``alias``: the same Hugging Face tensor is already written by another rule (tied output layer).
    """

    core: str
    hf: tuple[str, ...]
    op: Op
    alias: bool = False

    def at(self, layer: int) -> "Rule":
        """The rule for one layer."""
        names = tuple(name.format(layer=layer) for name in self.hf)
        return Rule(self.core.format(layer=layer), names, self.op, self.alias)


@dataclass(frozen=True)
class Mapping:
    """All rules of one model.

    ``prefix``: leading part of Hugging Face names that some checkpoints leave out; ``ignored``: patterns of tensors
    that carry no weights (masks, rotary tables).
    """

    family: str
    num_layers: int
    rules: tuple[Rule, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    def expanded(self) -> Iterator[Rule]:
        """Yield every rule of every layer, in model order."""
        layered = [rule for rule in self.rules if "{layer}" in rule.core]
        first = self.rules.index(layered[0])
        yield from self.rules[:first]
        for layer in range(self.num_layers):
            yield from (rule.at(layer) for rule in layered)
        yield from self.rules[first + len(layered) :]

    def rule(self, core_name: str) -> Rule:
        """Return the rule of a global core parameter name; raises MatchError with near names."""
        found = LAYER.match(core_name)
        layer = int(found.group(1)) if found else 0
        pattern = LAYER.sub("decoder.layers.{layer}.", core_name)
        for rule in self.rules:
            if rule.core == pattern and layer < self.num_layers:
                return rule.at(layer)
        names = (rule.core for rule in self.rules)
        raise MatchError(f"no {self.family} parameter is called {core_name!r}; {suggest(pattern, names)}")

    def sharding(self, core_name: str) -> Sharding:
        """How the base parameter ``core_name`` (global layer index) is cut over tensor-parallel ranks."""
        return self.rule(core_name).op.sharding

    def hf_names(self, core_name: str) -> tuple[str, ...]:
        """The Hugging Face tensors that make up ``core_name``."""
        return self.rule(core_name).hf

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model with its shape, each once, in model order."""
        return {name: shape for rule in self.expanded() for name, shape in zip(rule.hf, rule.op.shapes)}

    def canonical(self, hf_name: str) -> str | None:
        """The name as the rules spell it (prefix added), None for a tensor that carries no weights."""
        if any(re.search(pattern, hf_name) for pattern in self.ignored):
            return None
        known = {name.split(".", 1)[0] for rule in self.rules for name in rule.hf}
        return hf_name if hf_name.split(".", 1)[0] in known else self.prefix + hf_name
