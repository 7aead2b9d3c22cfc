"""LoRA, DoRA and CanonicalLoRA -> pairs of factors, one for each Hugging Face module."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.models.exchange.lazy import Held, Lazy
from graftwork.models.exchange.piece import LAYER_PREFIX, common
from graftwork.models.exchange.places import Linear, Places, shortest
from graftwork.peft.methods import CanonicalLoRA, DoRA, LoRA
from graftwork.peft.methods.dora import EMBEDDING

A, B, MAGNITUDE = "lora_A", "lora_B", "magnitude"


@dataclass(frozen=True)
class Pair:
    """Factors A [rank, in] and B [out, rank] of one Hugging Face module, scaled by alpha over rank (or its root).

    ``magnitude`` [out]: DoRA's. At an ``embedding`` A is [rank, vocab] and B [hidden, rank]. Of a parameter ``module``
    is the name, and ``place`` the module that holds the factors.
    """

    module: str
    rank: int
    alpha: float
    A: Lazy
    B: Lazy
    magnitude: Lazy | None = None
    embedding: bool = False
    place: str = ""

    def tensors(self) -> dict[str, Lazy]:
        """Return its tensors as Hugging Face PEFT calls them."""
        stem = f"{LAYER_PREFIX}{self.place or self.module}."
        if self.embedding:
            return {f"{stem}lora_embedding_A": self.A, f"{stem}lora_embedding_B": self.B}
        found = {f"{stem}lora_A.weight": self.A, f"{stem}lora_B.weight": self.B}
        return found if self.magnitude is None else {**found, f"{stem}lora_magnitude_vector": self.magnitude}


def pairs_of(transform: LoRA, places: Places, tensors: Held) -> list[Pair]:
    """Return the pairs of one adapter; raises ConfigError for an update that Hugging Face PEFT cannot hold."""
    sites = dict.fromkeys(name.rpartition(".")[0] for name in tensors.names)
    linears = [places.linear(site) for site in sites]
    found = [pair for linear in linears for pair in _at(transform, places, linear, tensors)]
    tensors.finish()
    return found


def config_of(transform: LoRA, places: Places, pairs: Sequence[Pair], base: str | None) -> dict[str, object]:
    """Return ``adapter_config.json`` of these pairs: targets, ranks, alphas by names that mean these modules alone."""
    modules = [pair.module for pair in pairs if not pair.place]
    parameters = [pair.module for pair in pairs if pair.place]
    ranks, alphas = ({pair.module: value(pair) for pair in pairs} for value in (_rank, _alpha))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        **common("SEQ_2_SEQ_LM" if places.seq2seq else "CAUSAL_LM", base),
        "alpha_pattern": patterns(alphas, alpha),
        "bias": "none",
        "fan_in_fan_out": places.transposed,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else transform.dropout,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": patterns(ranks, rank),
        "target_modules": shortest(modules, places.modules),
        **({"target_parameters": shortest(parameters, places.every_parameter)} if parameters else {}),
        "use_dora": isinstance(transform, DoRA),
        "use_rslora": transform.use_rslora,
    }


def patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Return trailing parts of the names whose value is not the ``usual`` one, with their values."""
    others = dict.fromkeys(value for value in values.values() if value != usual)
    return {
        end: value
        for value in others
        for end in shortest((name for name, held in values.items() if held == value), values)
    }


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """Return what an update is multiplied by."""
    return alpha / (rank**0.5 if rslora else rank)


def alpha_of(rank: int, scale: float, rslora: bool) -> float:
    """Return the alpha of a scale, a whole number where it is one: the inverse of ``scale_of``."""
    alpha = scale * (rank**0.5 if rslora else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha


def _at(transform: LoRA, places: Places, linear: Linear, tensors: Held) -> list[Pair]:
    if linear.leaf == EMBEDDING:
        return [_embedding(transform, places, linear, tensors)]
    if isinstance(transform, CanonicalLoRA):
        return _canonical(transform, linear, tensors)
    rank, alpha = transform.rank_and_alpha(linear.name)
    low = tensors.take(f"{linear.name}.{A}", rank, linear.inputs)
    high = tensors.take(f"{linear.name}.{B}", sum(linear.widths), rank)
    lengths = tensors.take(f"{linear.name}.{MAGNITUDE}", sum(linear.widths)) if isinstance(transform, DoRA) else None
    return [
        Pair(
            module,
            rank,
            alpha,
            low,
            Lazy((width, rank), partial(_rows_of, linear, high, index)),
            None if lengths is None else Lazy((width,), partial(_rows_of, linear, lengths, index)),
        )
        for index, (module, width) in enumerate(zip(linear.modules, linear.widths))
    ]


def _rows_of(linear: Linear, full: Lazy, index: int) -> Tensor:
    return linear.split(full[:])[index]


def _canonical(transform: CanonicalLoRA, linear: Linear, tensors: Held) -> list[Pair]:
    """Return a pair for each updated part, or one for all of them where they are one module."""
    held, found = set(tensors.names), {}
    prefixes = [f"{part}_" for part in linear.parts] or [""]
    for index, (prefix, name, count) in enumerate(zip(prefixes, linear.updates, linear.counts)):
        if f"{linear.name}.{prefix}{A}" in held:
            rank, alpha = transform.rank_and_alpha(name)
            low = tensors.take(f"{linear.name}.{prefix}{A}", rank, linear.inputs)
            high = tensors.take(f"{linear.name}.{prefix}{B}", count, rank)
            found[index] = Pair(linear.modules[0 if linear.fused else index], rank, alpha, low, high)
    return [one_of(linear, found, transform.use_rslora)] if linear.fused else list(found.values())


def one_of(linear: Linear, pairs: Mapping[int, Pair], rslora: bool) -> Pair:
    """Return one pair for the whole linear that is the sum of those of its parts, by index.

    Its A is theirs on top of each other; its B holds each of theirs in columns of its own, on the rows of its part, in
    the order of the parts. Scales that differ are folded into B.
    """
    ranks = [pair.rank for pair in pairs.values()]
    rank, scales = sum(ranks), [scale_of(pair.rank, pair.alpha, rslora) for pair in pairs.values()]
    fold = len(set(scales)) > 1
    alpha = alpha_of(rank, 1.0 if fold else scales[0], rslora)

    def high() -> Tensor:
        found, start = [torch.zeros(count, rank) for count in linear.counts], 0
        for (index, pair), scale in zip(pairs.items(), scales):
            found[index][:, start : start + pair.rank] = pair.B[:] * (scale if fold else 1.0)
            start += pair.rank
        return torch.cat(found)

    low = Lazy((rank, linear.inputs), lambda: torch.cat([pair.A[:] for pair in pairs.values()]))
    return Pair(linear.modules[0], rank, alpha, low, Lazy((sum(linear.counts), rank), high))


def _embedding(transform: LoRA, places: Places, linear: Linear, tensors: Held) -> Pair:
    if places.seq2seq:
        raise ConfigError(
            f"{transform} stands at {EMBEDDING}, which encoder and decoder of a {places.family.name} share and Hugging "
            "Face PEFT wraps in one of them only; leave it out of target_modules, or serve the adapter here."
        )
    rank, alpha = transform.rank_and_alpha(linear.name)
    ((vocabulary, hidden),) = linear.rows.shapes
    low = tensors.take(f"{linear.name}.{A}", vocabulary, rank)
    high = tensors.take(f"{linear.name}.{B}", hidden, rank)
    return Pair(linear.modules[0], rank, alpha, Lazy((rank, vocabulary), lambda: low[:].T), high, embedding=True)


def _rank(pair: Pair) -> float:
    return pair.rank


def _alpha(pair: Pair) -> float:
    return pair.alpha
