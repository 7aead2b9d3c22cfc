"""Canonical adapters: a bottleneck with a skip after each sub-layer (Houlsby et al. 2019, arXiv 1902.00751)."""

from collections.abc import Callable
from functools import partial
from typing import Optional

import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from graftwork.errors import ConfigError, MatchError, ParallelismError, suggest
from graftwork.parallel.sharding import Sharding
from graftwork.peft.adapter import INITIALIZERS, Adapter, Birth, Inner, ones, zeros
from graftwork.peft.cuts import Region, drop
from graftwork.peft.method import PEFT, LayerChoice
from graftwork.peft.sites import Host, Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "relu": F.relu, "gelu": F.gelu}
SITES = {"attention": "self_attention", "cross_attention": "cross_attention", "mlp": "mlp"}
Lender = Callable[[], nn.Module]
"""Finds the bottleneck whose parameters a tied one uses."""


class Bottleneck(Adapter):
    """``h' = h + W_out act(W_in LN(h))`` on a sub-layer's output; W_in [dim, h] cut by rows, W_out [h, dim] by columns.

    The sub-layer hands its linear bias on separately and megatron-core adds it afterwards: the adapter reads h
    without that bias, as NeMo's does. A parallel one computes ``h' = h + W_out act(W_in LN(x))`` from x, what the
    sub-layer reads. One with a ``lender`` has no parameters but that one's.
    """

    why_not_mergeable = "it is not linear"
    norm_weight: nn.Parameter
    norm_bias: nn.Parameter
    linear_in: nn.Parameter
    linear_out: nn.Parameter

    def __init__(
        self, birth: Birth, method: "CanonicalAdapter", hidden_size: int, region: Region, lender: Lender | None = None
    ) -> None:
        super().__init__(birth)
        self.region, self.method, self.lender = region, method, lender
        if lender is not None:
            return
        dim, h = method.dim, hidden_size
        self.new_parameter("norm_weight", Sharding((h,)), ones, partial=region.partial)
        self.new_parameter("norm_bias", Sharding((h,)), zeros, partial=region.partial)
        self.new_parameter("linear_in", Sharding((dim, h), dim=0), INITIALIZERS[method.column_init_method])
        self.new_parameter("linear_out", Sharding((h, dim), dim=1), INITIALIZERS[method.row_init_method])

    @property
    def held(self) -> "Bottleneck":
        """The bottleneck that has the parameters: this one, or the one that it is tied to."""
        held = self if self.lender is None else self.lender()
        assert isinstance(held, Bottleneck)
        return held

    def forward(self, inner: Inner, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor | None, ...]:
        """Adapt the first output of the sub-layer [s, b, h] and hand the rest (its bias) on."""
        output, *rest = inner(x, *args, **kwargs)
        return (self.added(output, self.update(x if self.method.parallel else output)), *rest)

    def update(self, h: Tensor) -> Tensor:
        """Return W_out act(W_in LN(h)), without the skip."""
        method, held = self.method, self.held
        x = held.norm(h) if method.norm_position == "pre" else h
        x = F.linear(self.region.enter(x), held.linear_in.to(x.dtype))
        # every rank holds its own part of the bottleneck
        x = drop(ACTIVATIONS[method.activation](x), method.dropout, self.training, differ=self.region.cut)
        x = self.region.leave(F.linear(x, held.linear_out.to(x.dtype)))
        return held.norm(x) if method.norm_position == "post" else x

    def norm(self, x: Tensor) -> Tensor:
        """Return LN(x)."""
        dtype = x.dtype
        return F.layer_norm(x, x.shape[-1:], self.norm_weight.to(dtype), self.norm_bias.to(dtype), 1e-5)

    def moved(self) -> bool:
        """A trained bottleneck has a non-zero W_out (or did not start from zero)."""
        return self.method.row_init_method != "zero" or bool(self.held.linear_out.detach().any())


class CanonicalAdapter(PEFT):
    """Bottleneck adapters on attention and MLP of every layer, behind or beside them, before the residual is added.

    Args:
        name: Unique name of this adapter in its model.
        dim: Width of the bottleneck; a multiple of the tensor-parallel size.
        sites: Which sub-layers, of ``attention``, ``mlp`` (of a mixture of experts: the whole mixture) and, between
            encoder and decoder, ``cross_attention``; default all that the model has.
        activation: ``swish``, ``relu`` or ``gelu``.
        norm_position: LayerNorm before W_in (``pre``) or after W_out (``post``).
        dropout: Probability of dropping a bottleneck activation.
        column_init_method: Initial W_in: ``xavier_normal`` (NeMo's ``xavier``), ``xavier``, ``kaiming``, ``normal``.
        row_init_method: Initial W_out; ``zero`` makes a fresh adapter the identity.
        parallel: Read the sub-layer's input instead of its output (arXiv 2110.04366): the residual stream where the
            norm is part of the sub-layer's first linear, what the norm returns where it stands before the sub-layer.
        tie_layers: One bottleneck for all layers of a part at each sub-layer: the first one's parameters serve all.
        layers: Global indices of the layers to adapt, or those of each part, e.g. ``{"decoder": [0, 1]}``; default all.
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
        parallel: bool = False,
        tie_layers: bool = False,
        layers: LayerChoice = None,
    ) -> None:
        super().__init__(name, layers)
        self.dim = self.count("dim", dim)
        self.sites = sites
        for site in sites or ():
            self.one_of("sites", site, SITES)
        if sites is not None and not sites:
            raise ConfigError(f"{self}: sites is empty; name some of {', '.join(SITES)} or leave it out for all.")
        self.parallel, self.tie_layers = self.switch("parallel", parallel), self.switch("tie_layers", tie_layers)
        self.activation = self.one_of("activation", activation, ACTIVATIONS)
        self.norm_position = self.one_of("norm_position", norm_position, ("pre", "post"))
        self.dropout = self.probability("dropout", dropout)
        self.column_init_method = self.one_of("column_init_method", column_init_method, INITIALIZERS)
        self.row_init_method = self.one_of("row_init_method", row_init_method, INITIALIZERS)

    def find(self, host: Host) -> list[Site]:
        """Return each layer's sub-layers."""
        stages = host.config.pipeline_model_parallel_size
        if self.tie_layers and stages > 1:
            raise ParallelismError(
                f"{self}: tie_layers=True needs pipeline_model_parallel_size=1, not {stages}: "
                "layers on two stages cannot share parameters."
            )
        sublayers = [s for s in host.sites() if s.inside in SITES.values() and not isinstance(s.module, IdentityOp)]
        known = host.everywhere(s.leaf for s in sublayers)
        valid = [name for name, leaf in SITES.items() if leaf in known]
        for name in self.sites or ():
            if name not in valid:
                raise MatchError(f"{self}: sites has {name!r}, which this model does not have; {suggest(name, valid)}")
        return host.select(sublayers, [SITES[name] for name in self.sites or ()] or ["*"], self.layers, str(self))

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build the bottleneck of one sub-layer."""
        config, size = host.config, host.config.tensor_model_parallel_size
        if self.dim % size:
            raise ParallelismError(f"{self}: dim {self.dim} is not a multiple of tensor_model_parallel_size {size}.")
        return Bottleneck(birth, self, config.hidden_size, Region.of(config), self._lender(site, host))

    def _lender(self, site: Site, host: Host) -> Lender | None:
        """Return what finds the same sub-layer's bottleneck in the first adapted layer, None for that one itself."""
        layers = self.layers.get(site.part or "") if isinstance(self.layers, dict) else self.layers
        first = min(layers) if layers else 0
        if not self.tie_layers or site.layer == first:
            return None
        end = f"{site.layer}.{site.inside}"
        path = f"{site.path.removesuffix(end)}{first}.{site.inside}.adapters.{self.name}"
        return partial(host.chunks[site.chunk].get_submodule, path)  # no closure: a copied model finds its own
