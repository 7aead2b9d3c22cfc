"""(IA)3: learned vectors scale keys, values and MLP activations (Liu et al. 2022, arXiv 2205.05638)."""

from typing import Optional

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError, ParallelismError
from graftwork.parallel.fused import QKVRows
from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import tp_size
from graftwork.peft.adapter import Adapter, Birth, Inner, ones
from graftwork.peft.cuts import Cut, cut_of, qkv_rows
from graftwork.peft.method import PEFT
from graftwork.peft.sites import Host, Site

TARGETS = ("k", "v", "ffn")


class ScaledKeyValue(Adapter):
    """Scales the key and value rows of a fused qkv linear's output, before RoPE.

    A vector has one value per key (or value) row, cut over the tensor-parallel ranks as the groups are.
    """

    mergeable = True

    def __init__(self, birth: Birth, rows: QKVRows, targets: list[str]) -> None:
        super().__init__(birth)
        self.rows = rows
        _, keys, _ = rows.counts
        for target in targets:
            self.new_parameter(f"scale_{target}", Sharding((keys,), dim=0), ones)

    def row_scale(self) -> Tensor:
        """Return this rank's factor on every row of the fused linear."""
        held = dict(self.named_parameters())
        unit = torch.ones_like(next(iter(held.values())))  # as many key rows as value rows
        queries = unit.new_ones(len(unit) * self.rows.heads // self.rows.groups)
        return self.rows.join(queries, held.get("scale_k", unit), held.get("scale_v", unit))

    def forward(self, inner: Inner, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Scale (output, bias) of the fused linear."""
        output, bias = inner(*args, **kwargs)
        scale = self.row_scale()
        return output * scale.to(output.dtype), None if bias is None else bias * scale.to(bias.dtype)

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
        return key * self.scale_k.view(-1, self.width).to(key.dtype)

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
        return inner(x * self.scale_ffn.to(x.dtype), *args, **kwargs)

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = W diag(l)."""
        return weight * self.scale_ffn.float()[None, :], bias

    def moved(self) -> bool:
        """A trained vector is no longer all ones."""
        return bool((self.scale_ffn.detach() != 1).any())


class IA3(PEFT):
    """Learned scales on keys, values and MLP activations; 2 * kv width + ffn values a layer.

    Args:
        name: Unique name of this adapter in its model.
        targets: Which of ``k``, ``v`` and ``ffn``; default all.
        key_position: Where keys are scaled in models that normalise keys: ``post_norm`` (default there) or
            ``pre_norm`` (HF PEFT's place; only this one merges and exports). Without a k_layernorm there is one place.
        layers: Global indices of the layers to adapt; default all.
    """

    default_lr = 1e-2

    def __init__(
        self,
        name: str = "ia3",
        targets: Optional[list[str]] = None,
        key_position: Optional[str] = None,
        layers: Optional[list[int]] = None,
    ) -> None:
        super().__init__(name, layers)
        self.targets = targets
        if targets is not None and not targets:
            raise ConfigError(f"{self}: targets is empty; name some of {', '.join(TARGETS)} or leave it out for all.")
        for target in targets or ():
            self.one_of("targets", target, TARGETS)
        if key_position is not None:
            self.one_of("key_position", key_position, ("post_norm", "pre_norm"))
        self.key_position = key_position

    def find(self, host: Host) -> list[Site]:
        """Return linear_qkv, linear_fc2 and, for keys scaled after their norm, k_layernorm of each layer."""
        leaves = self._leaves(host)
        return host.select((s for s in host.sites() if s.layer is not None), leaves, self.layers, str(self))

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build the vectors of one site."""
        if site.leaf == "linear_fc2":
            return ScaledHidden(birth, cut_of(site, host))
        rows, size = qkv_rows(host.config), tp_size()
        if rows.groups % size:
            raise ParallelismError(
                f"{self}: {rows.groups} query groups cannot be cut over "
                f"tensor_model_parallel_size {size}; use a size that divides them."
            )
        if site.leaf == "k_layernorm":
            return ScaledNormalizedKey(birth, rows)
        return ScaledKeyValue(birth, rows, self._fused_targets(host))

    def _leaves(self, host: Host) -> list[str]:
        chosen = self.targets or TARGETS
        leaves = ["linear_qkv"] if self._fused_targets(host) else []
        if "k" in chosen and self._after_norm(host):
            leaves.append("k_layernorm")
        return leaves + (["linear_fc2"] if "ffn" in chosen else [])

    def _fused_targets(self, host: Host) -> list[str]:
        return [t for t in self.targets or TARGETS if t == "v" or (t == "k" and not self._after_norm(host))]

    def _after_norm(self, host: Host) -> bool:
        return bool(host.config.qk_layernorm) and self.key_position != "pre_norm"
