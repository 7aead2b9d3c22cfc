"""(IA)3: learned vectors scale keys, values and MLP activations (Liu et al. 2022, arXiv 2205.05638)."""

from typing import Optional

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError, MatchError, ParallelismError, suggest
from graftwork.parallel.fused import KVRows, QKVRows
from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import tp_size
from graftwork.peft.adapter import Adapter, Birth, Inner, ones
from graftwork.peft.cuts import Cut, cut_of, qkv_rows
from graftwork.peft.method import PEFT, LayerChoice
from graftwork.peft.sites import Host, Site, matches

TARGETS = ("k", "v", "ffn")
ATTENTION = {"self": "self_attention", "cross": "cross_attention"}
FUSED = {"self": "linear_qkv", "cross": "linear_kv"}
"""The linear that makes keys and values, among others, in each kind of attention."""
NORM, SECOND = "k_layernorm", "linear_fc2"


class ScaledKeyValue(Adapter):
    """Scales the key and value rows of a fused linear's output, before RoPE.

    A vector has one value per key (or value) row, cut over the tensor-parallel ranks as the groups are.
    """

    mergeable = True

    def __init__(self, birth: Birth, rows: QKVRows | KVRows, targets: list[str]) -> None:
        super().__init__(birth)
        self.rows = rows
        *_, keys = rows.counts
        for target in targets:
            self.new_parameter(f"scale_{target}", Sharding((keys,), dim=0), ones)

    def row_scale(self) -> Tensor:
        """Return this rank's factor on every row of the fused linear."""
        held = dict(self.named_parameters())
        unit = torch.ones_like(next(iter(held.values())))  # as many key rows as value rows
        key, value = held.get("scale_k", unit), held.get("scale_v", unit)
        if isinstance(self.rows, KVRows):
            return self.rows.join(key, value)
        queries = unit.new_ones(len(unit) * self.rows.heads // self.rows.groups)
        return self.rows.join(queries, key, value)

    def forward(self, inner: Inner, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Scale (output, bias) of the fused linear."""
        output, bias = inner(*args, **kwargs)
        scale = self.row_scale()
        scaled = self.chosen(output * scale.to(output.dtype), output)
        if bias is None:
            return scaled, None
        return scaled, self.chosen((bias * scale.to(bias.dtype)).expand_as(output), bias)  # handed on, added later

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = diag(l) W and b' = l b on the key and value rows."""
        scale = self.row_scale().float()
        return weight * scale[:, None], None if bias is None else bias * scale

    def moved(self) -> bool:
        """Trained vectors are no longer all ones."""
        return any(bool((p.detach() != 1).any()) for p in self.parameters())


class ScaledNormalizedKey(Adapter):
    """Scales keys [s, b, groups, width] after a k_layernorm, which would largely undo a scale before it."""

    why_not_mergeable = 'it scales keys after k_layernorm; key_position="pre_norm" merges'
    scale_k: nn.Parameter

    def __init__(self, birth: Birth, rows: QKVRows) -> None:
        super().__init__(birth)
        self.width = rows.width
        _, keys, _ = rows.counts
        self.new_parameter("scale_k", Sharding((keys,), dim=0), ones)

    def forward(self, inner: Inner, *args: object, **kwargs: object) -> Tensor:
        """Scale the normalised keys."""
        key: Tensor = inner(*args, **kwargs)
        return self.chosen(key * self.scale_k.view(-1, self.width).to(key.dtype), key)

    def moved(self) -> bool:
        """A trained vector is no longer all ones."""
        return bool((self.scale_k.detach() != 1).any())


class ScaledHidden(Adapter):
    """Scales the MLP's hidden activations [s, b, ffn]: the input of the second linear."""

    mergeable = True
    scale_ffn: nn.Parameter

    def __init__(self, birth: Birth, cut: Cut) -> None:
        super().__init__(birth)
        self.new_parameter("scale_ffn", cut.input_vector(), ones)

    def forward(self, inner: Inner, x: Tensor, *args: object, **kwargs: object) -> object:
        """Scale the linear's input."""
        return inner(self.chosen(x * self.scale_ffn.to(x.dtype), x), *args, **kwargs)

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = W diag(l)."""
        return weight * self.scale_ffn.float()[None, :], bias

    def moved(self) -> bool:
        """A trained vector is no longer all ones."""
        return bool((self.scale_ffn.detach() != 1).any())


class IA3(PEFT):
    """Learned scales on keys, values and MLP activations; 2 * kv width + ffn values a layer (ffn for each expert).

    Args:
        name: Unique name of this adapter in its model.
        targets: Which of ``k``, ``v`` and ``ffn`` (in a mixture, the activations of every expert); default all.
        attention: Where ``k`` and ``v`` are scaled: ``self`` and, between encoder and decoder, ``cross``; default
            wherever the model has attention.
        key_position: Where keys are scaled in models that normalise keys: ``post_norm`` (default there) or
            ``pre_norm`` (HF PEFT's place; only this one merges and exports). Without a k_layernorm there is one place.
        layers: Global indices of the layers to adapt, or those of each part, e.g. ``{"decoder": [0, 1]}``; default all.
    """

    default_lr = 1e-2

    def __init__(
        self,
        name: str = "ia3",
        targets: Optional[list[str]] = None,
        key_position: Optional[str] = None,
        attention: Optional[list[str]] = None,
        layers: LayerChoice = None,
    ) -> None:
        super().__init__(name, layers)
        self.targets = targets
        if targets is not None and not targets:
            raise ConfigError(f"{self}: targets is empty; name some of {', '.join(TARGETS)} or leave it out for all.")
        for target in targets or ():
            self.one_of("targets", target, TARGETS)
        if key_position is not None:
            self.one_of("key_position", key_position, ("post_norm", "pre_norm"))
        self.key_position, self.attention = key_position, attention
        if attention is not None and not (attention and {"k", "v"} & set(targets or TARGETS)):
            raise ConfigError(
                f"{self}: attention says where k and v are scaled, but is empty or targets names neither of them; "
                f"name some of {', '.join(ATTENTION)} or leave it out for all."
            )
        for kind in attention or ():
            self.one_of("attention", kind, ATTENTION)

    def find(self, host: Host) -> list[Site]:
        """Return the linears of keys and values, linear_fc2 and, for keys scaled after their norm, k_layernorm."""
        sites = [s for s in host.sites() if s.layer is not None]
        inside = host.everywhere(str(s.inside) for s in sites if s.leaf in FUSED.values())
        kinds = [kind for kind in FUSED if f"{ATTENTION[kind]}.{FUSED[kind]}" in inside]
        for kind in self.attention or ():
            if kind not in kinds:
                raise MatchError(f"{self}: attention has {kind!r}, which this model lacks; {suggest(kind, kinds)}")
        places = self._places(self.attention or kinds, host)
        if self.attention is not None:
            return host.select(sites, places, self.layers, str(self))
        # of several kinds of attention nobody has asked for, selected layers may have some
        usual = [s for s in sites if any(matches(place, s.name) for place in places)]
        return host.select(usual, ["*"], self.layers, str(self))

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build the vectors of one site."""
        if site.leaf == SECOND:
            return ScaledHidden(birth, cut_of(site, host))
        rows, size = qkv_rows(host.config), tp_size()
        if rows.groups % size:
            raise ParallelismError(
                f"{self}: {rows.groups} query groups cannot be cut over "
                f"tensor_model_parallel_size {size}; use a size that divides them."
            )
        if site.leaf == NORM:
            return ScaledNormalizedKey(birth, rows)
        if site.leaf == FUSED["cross"]:
            return ScaledKeyValue(birth, KVRows(rows.heads, rows.width), self._scaled("cross", host))
        return ScaledKeyValue(birth, rows, self._scaled("self", host))

    def _places(self, kinds: list[str], host: Host) -> list[str]:
        """Return the paths, within a layer, of what is scaled."""
        places = [f"{ATTENTION[kind]}.{FUSED[kind]}" for kind in kinds if self._scaled(kind, host)]
        if "self" in kinds and "k" in self._chosen and self._after_norm(host):
            places.append(f"{ATTENTION['self']}.{NORM}")
        return places + ([SECOND] if "ffn" in self._chosen else [])

    @property
    def _chosen(self) -> list[str]:
        return self.targets or list(TARGETS)

    def _scaled(self, kind: str, host: Host) -> list[str]:
        """Return which of keys and values are scaled in the fused linear of a kind of attention."""
        later = kind == "self" and self._after_norm(host)
        return [t for t in self._chosen if t == "v" or (t == "k" and not later)]

    def _after_norm(self, host: Host) -> bool:
        return bool(host.config.qk_layernorm) and self.key_position != "pre_norm"
