"""(IA)3: learned vectors scale keys, values and MLP activations (Liu et al. 2022, arXiv 2205.05638)."""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError, ParallelismError
from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import tp_size
from graftwork.peft.adapter import Adapter, Birth, ones
from graftwork.peft.cuts import local_widths
from graftwork.peft.host import Host
from graftwork.peft.method import PEFT
from graftwork.peft.sites import Site

TARGETS = ("k", "v", "ffn")


class ScaledKeyValue(Adapter):
    """Scales the key and value rows of a fused qkv linear's output, before RoPE.

    The rows are laid out as [groups, heads/groups + 2, head width] (queries, key, value of each group). A vector has
    groups * head width values, cut over the tensor-parallel ranks as the groups are.
    """

    mergeable = True

    def __init__(self, birth: Birth, config: Any, targets: list[str]) -> None:
        super().__init__(birth)
        self.groups = config.num_query_groups // self.tp[1]
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.width = config.kv_channels
        self.targets = targets
        for target in targets:
            sharding = Sharding((config.num_query_groups * self.width,), dim=0)
            self.new_parameter(f"scale_{target}", sharding, ones)

    def row_scale(self) -> Tensor:
        """Return this rank's factor on every row of the fused linear [groups * (heads/groups + 2) * width]."""
        unit = next(self.parameters()).new_ones(self.groups, 1, self.width)
        parts = [unit.expand(-1, self.heads_per_group, -1)]
        for target in ("k", "v"):
            held = target in self.targets
            parts.append(getattr(self, f"scale_{target}").view(self.groups, 1, self.width) if held else unit)
        return torch.cat(parts, dim=1).reshape(-1)

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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

    def __init__(self, birth: Birth, config: Any) -> None:
        super().__init__(birth)
        self.width = config.kv_channels
        self.new_parameter("scale_k", Sharding((config.num_query_groups * self.width,), dim=0), ones)

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Scale the normalised keys."""
        key = inner(*args, **kwargs)
        return key * self.scale_k.view(-1, self.width).to(key.dtype)

    def moved(self) -> bool:
        """A trained vector is no longer all ones."""
        return bool((self.scale_k.detach() != 1).any())


class ScaledHidden(Adapter):
    """Scales the MLP's hidden activations [s, b, ffn]: the input of the second linear."""

    mergeable = True
    scale_ffn: nn.Parameter

    def __init__(self, birth: Birth, ffn_local: int, parallel: bool) -> None:
        super().__init__(birth, parallel)
        self.new_parameter("scale_ffn", Sharding((ffn_local * self.tp[1],), dim=0 if parallel else None), ones)

    def forward(self, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
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
        config, size = host.config, tp_size()
        if site.leaf == "linear_fc2":
            return ScaledHidden(birth, local_widths(site.module)[1], parallel=not site.in_expert)
        if config.num_query_groups % size:
            raise ParallelismError(
                f"{self}: {config.num_query_groups} query groups cannot be cut over "
                f"tensor_model_parallel_size {size}; use a size that divides them."
            )
        if site.leaf == "k_layernorm":
            return ScaledNormalizedKey(birth, config)
        return ScaledKeyValue(birth, config, self._fused_targets(host))

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
