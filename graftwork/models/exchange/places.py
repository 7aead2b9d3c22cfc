"""Where the linears that adapters stand at are in a Hugging Face model, and which rows of ours are whose there."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from graftwork.errors import ConfigError, MatchError, quoted, suggest
from graftwork.models.shape import Shape
from graftwork.models.weights import family_named, mapping_for
from graftwork.models.weights.mapping import Mapping as Weights
from graftwork.models.weights.mapping import Rule
from graftwork.models.weights.ops import KV, QKV, Fused, Gated, Op, Transposed, Whole
from graftwork.peft.cuts import GATED, OUTPUT
from graftwork.peft.methods.canonical_lora import GATE, UP
from graftwork.peft.methods.dora import EMBEDDING
from graftwork.peft.sites import Place

LINEARS = ("linear_qkv", "linear_q", "linear_kv", "linear_proj", GATED, "linear_fc2", EMBEDDING, OUTPUT)
"""The last part of the name of everything that a low-rank update can stand at."""
PARTS: Mapping[type[Op], tuple[str, ...]] = {
    QKV: ("linear_q", "linear_k", "linear_v"),
    KV: ("linear_k", "linear_v"),
    Gated: (GATE, UP),
}
"""What the linears are called that were fused into one, in the order of its rows."""
MOST_LAYERS, MOST_EXPERTS = 4096, 200_000
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Linear(Place):
    """One linear of ours (or the embedding) and the Hugging Face modules that it is made of.

    ``parts``: names of the linears that were fused into it, none for a single one. ``rows`` lays out anything that has
    one row per output, [outputs, ...].
    """

    modules: tuple[str, ...]
    parts: tuple[str, ...]
    rows: Op

    @property
    def fused(self) -> bool:
        """Whether they are fused on the Hugging Face side too: several parts in one module."""
        return isinstance(self.rows, Fused)

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.rows.shapes[0][1]

    @property
    def widths(self) -> list[int]:
        """Number of outputs of each module."""
        return [shape[0] for shape in self.rows.shapes]

    @property
    def counts(self) -> list[int]:
        """Number of rows of each part, or of the whole."""
        return [shape[0] for shape in self.parted.shapes]

    @property
    def parted(self) -> Op:
        """What lays out anything that has one row per output, part by part."""
        return self.rows.inner if isinstance(self.rows, Fused) else self.rows

    @property
    def updates(self) -> list[str]:
        """The names that CanonicalLoRA gives to the parts, or to the one linear."""
        stem = self.name.removesuffix(self.leaf)
        if self.parts:
            return [stem + part for part in self.parts]
        return [stem + UP if self.leaf == GATED else self.name]

    def split(self, full: Tensor) -> list[Tensor]:
        """Return the rows [n, ...] of each module of ours [outputs, ...]."""
        return self.rows.write(full)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return our rows [outputs, ...]: the inverse of ``split``."""
        return self.rows.join(tensors)


@dataclass(frozen=True)
class Stacked:
    """A parameter [experts, rows, inputs] that transformers has, since version 5, for a linear of all its experts.

    ``name``: of the parameter; ``linears``: that of each expert, whose modules' rows stand one below the other.
    """

    name: str
    linears: tuple[Linear, ...]

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]


class Places:
    """Every linear of a model and its embedding, by our names and by Hugging Face's.

    Experts' linears have the names of published checkpoints, which are those of their modules up to version 4 of
    transformers. Raises ConfigError for more than ``MOST_LAYERS`` layers or ``MOST_EXPERTS`` experts.
    """

    def __init__(self, shape: Shape) -> None:
        self.family = family_named(shape.family)
        # An untied head has a module of its own; so has a tied one, though not a tensor.
        self._mapping = mapping_for(replace(shape, tie_embeddings=False), tensor_parallel=1)
        layers, self.experts = sum(self._mapping.layers.values()), self._mapping.experts
        if layers > MOST_LAYERS:
            raise ConfigError(f"a model of {layers:,} layers has no adapters to exchange; at most {MOST_LAYERS:,} can.")
        if layers * self.experts > MOST_EXPERTS:
            raise ConfigError(f"a model of {layers} times {quoted(self.experts)} experts has no adapters to exchange.")
        found = (_linear(rule) for rule in self._mapping.expanded())
        self.linears = {linear.name: linear for linear in found if linear is not None}
        self.modules = {module: linear for linear in self.linears.values() for module in linear.modules}

    @cached_property
    def stacks(self) -> dict[str, Stacked]:
        """What transformers holds of all experts of a layer together, by its name."""
        return {one.name: one for one in _stacks(self._mapping, self.linears)}

    @cached_property
    def parameters(self) -> dict[str, Linear | Stacked]:
        """Every matrix that Hugging Face PEFT may adapt as a parameter, by the name that transformers gives it."""
        plain = {
            name + _WEIGHT: linear
            for name, linear in self.modules.items()
            if not (linear.in_expert or linear.leaf == EMBEDDING or self.transposed)
        }
        return {**plain, **self.stacks}

    @cached_property
    def every_parameter(self) -> set[str]:
        """The names of all parameters of the model that transformers builds."""
        apart = {module + _WEIGHT for module in self._of_experts}
        return (self._mapping.hf_shapes().keys() - apart) | self.stacks.keys()

    @cached_property
    def mistaken(self) -> set[str]:
        """Modules that PEFT takes for experts' linears, which it looks for by the last part of a name."""
        leaves = {module.rpartition(".")[2] for module in self._of_experts}
        return {module for module in self.modules if module.rpartition(".")[2] in leaves} - self._of_experts

    @cached_property
    def _of_experts(self) -> set[str]:
        return {module for module, linear in self.modules.items() if linear.in_expert}

    @property
    def seq2seq(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return self.family.kind == "t5"

    @property
    def transposed(self) -> bool:
        """Whether Hugging Face stores its weights [in, out] (GPT-2's Conv1D)."""
        return self.family.name == "gpt2"

    def updates(self, apart: bool) -> list[str]:
        """Return the names of all low-rank updates; ``apart``: one for each linear that was fused (CanonicalLoRA's)."""
        linears = self.linears.values()
        return [name for linear in linears for name in (linear.updates if apart else (linear.name,))]

    def linear(self, site: str) -> Linear:
        """Return one of ours; raises MatchError for a name that is none."""
        if site not in self.linears:
            leaves = {linear.leaf for linear in self.linears.values()}
            raise MatchError(f"{site!r} is no linear of this {self.family.name}; {suggest(site, leaves)}")
        return self.linears[site]


def shortest(wanted: Iterable[str], known: Collection[str]) -> list[str]:
    """Return trailing parts of names, as short as can be, that mean the ``wanted`` and no other of the ``known``."""
    chosen = list(wanted)
    others = {end for name in set(known) - set(chosen) for end in _ends(name)}
    return list(dict.fromkeys(next(end for end in _ends(name) if end not in others) for name in chosen))


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _stacks(mapping: Weights, linears: Mapping[str, Linear]) -> Iterable[Stacked]:
    for stack in mapping.stacks:
        for layer in range(sum(mapping.layers.values())):
            if stack.rule.stands_in(layer):
                names = (stack.rule.at(layer, expert).core for expert in range(mapping.experts))
                own = tuple(linears[name.removesuffix(_WEIGHT)] for name in names)
                yield Stacked(stack.parameter.format(layer=layer), own)


def _linear(rule: Rule) -> Linear | None:
    site = rule.core.removesuffix(_WEIGHT)
    if site == rule.core or site.rpartition(".")[2] not in LINEARS:
        return None
    rows = rule.op.inner if isinstance(rule.op, (Transposed, Whole)) else rule.op
    parts = PARTS.get(type(rows.inner if isinstance(rows, Fused) else rows), ())
    return Linear(site, tuple(name.removesuffix(_WEIGHT) for name in rule.hf), parts, rows)
