"""Canonical adapters: a bottleneck with a skip after each sub-layer (Houlsby et al. 2019, arXiv 1902.00751)."""

from collections.abc import Callable
from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.errors import ConfigError, ParallelismError
from graftwork.parallel.sharding import Sharding
from graftwork.peft.adapter import INITIALIZERS, Adapter, Birth, Inner, ones, zeros
from graftwork.peft.cuts import Region, drop
from graftwork.peft.method import PEFT
from graftwork.peft.sites import Host, Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "relu": F.relu, "gelu": F.gelu}
SITES = {"attention": "self_attention", "mlp": "mlp"}


class Bottleneck(Adapter):
    """``h' = h + W_out act(W_in LN(h))`` on a sub-layer's output; W_in [dim, h] cut by rows, W_out [h, dim] by columns.

    The sub-layer hands its linear bias on separately and megatron-core adds it afterwards: the adapter reads h
    without that bias, as NeMo's does.
    """

    why_not_mergeable = "it is not linear"
    norm_weight: nn.Parameter
    norm_bias: nn.Parameter
    linear_in: nn.Parameter
    linear_out: nn.Parameter

    def __init__(self, birth: Birth, method: "CanonicalAdapter", hidden_size: int, region: Region) -> None:
        super().__init__(birth)
        self.region, self.method = region, method
        dim, h = method.dim, hidden_size
        self.new_parameter("norm_weight", Sharding((h,)), ones, partial=region.partial)
        self.new_parameter("norm_bias", Sharding((h,)), zeros, partial=region.partial)
        self.new_parameter("linear_in", Sharding((dim, h), dim=0), INITIALIZERS[method.column_init_method])
        self.new_parameter("linear_out", Sharding((h, dim), dim=1), INITIALIZERS[method.row_init_method])

    def forward(self, inner: Inner, *args: object, **kwargs: object) -> tuple[Tensor | None, ...]:
        """Adapt the first output of the sub-layer [s, b, h] and hand the rest (its bias) on."""
        output, *rest = inner(*args, **kwargs)
        return (output + self.update(output).to(output.dtype), *rest)

    def update(self, h: Tensor) -> Tensor:
        """Return W_out act(W_in LN(h)), without the skip."""
        method = self.method
        x = self._norm(h) if method.norm_position == "pre" else h
        x = F.linear(self.region.enter(x), self.linear_in.to(x.dtype))
        # every rank holds its own part of the bottleneck
        x = drop(ACTIVATIONS[method.activation](x), method.dropout, self.training, differ=self.region.cut)
        x = self.region.leave(F.linear(x, self.linear_out.to(x.dtype)))
        return self._norm(x) if method.norm_position == "post" else x

    def _norm(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        return F.layer_norm(x, x.shape[-1:], self.norm_weight.to(dtype), self.norm_bias.to(dtype), 1e-5)

    def moved(self) -> bool:
        """A trained bottleneck has a non-zero W_out (or did not start from zero)."""
        return self.method.row_init_method != "zero" or bool(self.linear_out.detach().any())


class CanonicalAdapter(PEFT):
    """Bottleneck adapters on the attention output and the MLP output of every layer, before the residual is added.

    Args:
        name: Unique name of this adapter in its model.
        dim: Width of the bottleneck; a multiple of the tensor-parallel size.
        sites: Which sub-layers, of ``attention`` and ``mlp``; default both.
        activation: ``swish``, ``relu`` or ``gelu``.
        norm_position: LayerNorm before W_in (``pre``) or after W_out (``post``).
        dropout: Probability of dropping a bottleneck activation.
        column_init_method: Initial W_in: ``xavier_normal`` (NeMo's ``xavier``), ``xavier``, ``kaiming``, ``normal``.
        row_init_method: Initial W_out; ``zero`` makes a fresh adapter the identity.
        layers: Global indices of the layers to adapt; default all.
    """

    default_lr = 1e-3

    def __init__(
        self,
        name: str = "canonical_adapter",
        dim: int = 32,
        sites: Optional[list[str]] = None,
        activation: str = "swish",
        norm_position: str = "pre",
        dropout: float = 0.0,
        column_init_method: str = "xavier_normal",
        row_init_method: str = "zero",
        layers: Optional[list[int]] = None,
    ) -> None:
        super().__init__(name, layers)
        self.dim = self.count("dim", dim)
        self.sites = sites
        for site in sites or ():
            self.one_of("sites", site, SITES)
        if sites is not None and not sites:
            raise ConfigError(f"{self}: sites is empty; name some of {', '.join(SITES)} or leave it out for both.")
        self.activation = self.one_of("activation", activation, ACTIVATIONS)
        self.norm_position = self.one_of("norm_position", norm_position, ("pre", "post"))
        self.dropout = self.probability("dropout", dropout)
        self.column_init_method = self.one_of("column_init_method", column_init_method, INITIALIZERS)
        self.row_init_method = self.one_of("row_init_method", row_init_method, INITIALIZERS)

    def find(self, host: Host) -> list[Site]:
        """Return each layer's attention and MLP sub-layers."""
        sublayers = [s for s in host.sites() if s.inside in SITES.values()]
        wanted = [SITES[s] for s in self.sites or SITES]
        return host.select(sublayers, wanted, self.layers, str(self))

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build the bottleneck of one sub-layer."""
        config, size = host.config, host.config.tensor_model_parallel_size
        if self.dim % size:
            raise ParallelismError(f"{self}: dim {self.dim} is not a multiple of tensor_model_parallel_size {size}.")
        return Bottleneck(birth, self, config.hidden_size, Region.of(config))
