"""LoRA: a low-rank update beside a frozen linear (Hu et al. 2021, arXiv 2106.09685)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.layers import normalized_input
from graftwork.errors import ConfigError, suggest
from graftwork.parallel.sharding import Sharding
from graftwork.peft.adapter import INITIALIZERS, Adapter, Birth, Inner, Product, normal
from graftwork.peft.cuts import Cut, Region, cut_of, drop, is_embedding, is_linear
from graftwork.peft.embedding import EmbeddingLookup
from graftwork.peft.low_rank import is_whole, low_rank_linear
from graftwork.peft.method import PEFT, LayerChoice
from graftwork.peft.sites import Host, Place, Site, matches

DEFAULT_TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
_LOCAL_EXPERT = re.compile(r"(?<=\.experts)\.local_experts\.\d+")

Lender = Callable[[], nn.Module]
"""Finds the module whose factors an adapter uses in place of its own."""


@dataclass(frozen=True)
class LowRank:
    """Rank, scale, dropout and initial values of one site's update."""

    dim: int
    scale: float
    dropout: float
    dropout_position: str
    init_A: str
    init_B: str


@dataclass(frozen=True)
class Update(Place):
    """One low-rank update: beside the whole linear (or embedding) at ``site``, or one of those fused into it."""

    site: Site
    cut: Cut | None
    """Of a linear."""

    @property
    def plan_name(self) -> str:
        """Its name without the number of its expert."""
        return unnumbered(self.name)


class LowRankAdapter(Adapter):
    """Low-rank updates beside one linear; the factors are its own, or lent by another module (``SharedFactors``)."""

    mergeable = True
    base: nn.Module
    lender: Lender | None

    def __init__(self, birth: Birth, base: nn.Module, cut: Cut, lender: Lender | None = None) -> None:
        super().__init__(birth)
        # the base is read for its fused LayerNorm and weight; both stay where they are in the module tree
        self.__dict__ |= {"base": base, "lender": lender}
        self.cut = cut

    def new_factors(self, low_rank: LowRank, cut: Cut, prefix: str = "") -> None:
        """Register factors A [r, in] and B [out, r] of a linear, cut as it is, unless they are lent."""
        if self.lender is None:
            init_A, init_B = INITIALIZERS[low_rank.init_A], INITIALIZERS[low_rank.init_B]
            A, B = cut.input_factor(low_rank.dim), cut.output_factor(low_rank.dim)
            self.new_parameter(f"{prefix}lora_A", A, init_A, partial=cut.input_partial)
            self.new_parameter(f"{prefix}lora_B", B, init_B, partial=cut.output_partial)

    def own_product(self, low_rank: LowRank, prefix: str) -> list[Product]:
        """Return the update of the linear whose factors have ``prefix``; none where they are lent."""
        if self.lender is not None:
            return []
        A, B = (self.get_parameter(f"{prefix}lora_{factor}") for factor in "AB")
        return [Product(A, B, low_rank.scale)]

    def factor(self, name: str) -> Tensor:
        """Return factor ``name``, its own or lent."""
        return (self if self.lender is None else self.lender()).get_parameter(name)


class LoRALinear(LowRankAdapter):
    """``y = base(x) + scale * B A x`` with A [r, in] and B [out, r]; x is what the base linear multiplies."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, birth: Birth, base: nn.Module, cut: Cut, low_rank: LowRank, lender: Lender | None = None, prefix: str = ""
    ) -> None:
        super().__init__(birth, base, cut, lender)
        self.low_rank, self.prefix = low_rank, prefix
        self.new_factors(low_rank, cut, prefix)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.factor(f"{self.prefix}lora_A"), self.factor(f"{self.prefix}lora_B")

    def forward(self, inner: Inner, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor | None, ...]:
        """Add the update to the first output of ``inner`` (megatron-core linears return (output, bias))."""
        if inner is self.base and not (args or kwargs) and self._at_once(x):
            return self._with_base(x)
        output, *rest = inner(x, *args, **kwargs)
        return (self.added(output, self.update(normalized_input(self.base, x))), *rest)

    def update(self, x: Tensor) -> Tensor:
        """Return scale * B A x for what the base multiplies, x [s, b, in]."""
        plan, cut = self.low_rank, self.cut
        if plan.dropout and plan.dropout_position == "pre":
            x = drop(x, plan.dropout, self.training, cut.inputs_differ)
        out = self.product(x)
        if plan.dropout and plan.dropout_position == "post":
            out = drop(out, plan.dropout, self.training, cut.outputs_differ)
        return out

    def _at_once(self, x: Tensor) -> bool:
        """Tell whether base and update are one function of x: on all rows, without dropout, not cut over ranks."""
        dropped = self.training and self.low_rank.dropout
        return is_whole(self.base) and not self.cut.region.cut and not dropped and self._here(x) is None

    def _with_base(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        base: Any = self.base
        added, handed_on = (None, base.bias) if base.skip_bias_add else (base.bias, None)
        x = normalized_input(base, x)
        return low_rank_linear(x, base.weight, added, *self.factors, self.low_rank.scale), handed_on

    def product(self, x: Tensor) -> Tensor:
        """Return scale * B A x without dropout."""
        A, B = self.factors
        low = self.cut.between(F.linear(x, A.to(x.dtype)))
        return F.linear(low * self.low_rank.scale, B.to(x.dtype))  # r values a token to scale, not the whole output

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = W + scale * B A on this rank's part, in fp32."""
        A, B = self.factors
        return weight + self.low_rank.scale * (B.float() @ A.float()), bias

    def products(self) -> list[Product]:
        """The one update."""
        return self.own_product(self.low_rank, self.prefix)

    def moved(self) -> bool:
        """A trained LoRA has a non-zero B (or did not start from zero)."""
        return self.low_rank.init_B != "zero" or bool(self.factors[1].detach().any())


class SharedFactors(Adapter):
    """One pair of factors for all experts of a layer, per linear: held beside the experts, used inside of them.

    It is no expert's: every rank holds it whole, and its gradient is summed over the ranks that hold other experts.
    """

    mergeable = True
    passive = True

    def __init__(self, birth: Birth, plans: Mapping[str, tuple[Cut, LowRank]], partial: bool) -> None:
        super().__init__(birth)
        self.plans = plans
        for name, (cut, plan) in plans.items():
            A, B = Sharding((plan.dim, cut.inputs)), Sharding((cut.outputs, plan.dim))
            self.new_parameter(f"{name}_lora_A", A, INITIALIZERS[plan.init_A], partial)
            self.new_parameter(f"{name}_lora_B", B, INITIALIZERS[plan.init_B], partial)

    def forward(self, inner: Inner, *args: object, **kwargs: object) -> object:
        """Call the experts, whose linears use the factors."""
        return inner(*args, **kwargs)

    def products(self) -> list[Product]:
        """The update of every linear: each expert has it."""
        factors = {name: [self.get_parameter(f"{name}_lora_{factor}") for factor in "AB"] for name in self.plans}
        return [Product(A, B, self.plans[name][1].scale) for name, (A, B) in factors.items()]

    def moved(self) -> bool:
        """Trained factors B are not zero (or did not start there)."""
        return any(
            plan.init_B != "zero" or bool(self.get_parameter(f"{name}_lora_B").detach().any())
            for name, (_, plan) in self.plans.items()
        )


class LoRAEmbedding(EmbeddingLookup):
    """``y = base(ids) + scale * (A[ids] B^T)`` with A [vocab, r] and B [h, r], both replicated."""

    why_not_mergeable = "a low-rank embedding update would also change a tied output layer"
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, birth: Birth, base: nn.Module, low_rank: LowRank, vocab_size: int, hidden_size: int) -> None:
        super().__init__(birth, base)
        self.low_rank = low_rank
        # as in Hugging Face PEFT the looked-up factor starts at zero and the output factor at random
        self.new_matrix("lora_A", (vocab_size, low_rank.dim), INITIALIZERS[low_rank.init_B])
        self.new_matrix("lora_B", (hidden_size, low_rank.dim), normal(1.0))

    def forward(self, inner: Inner, ids: Tensor) -> Tensor:
        """Add the update to the embeddings of ``ids`` [b, s]; virtual ids get none."""
        output: Tensor = inner(ids)
        known = ids.clamp(max=self.lora_A.shape[0] - 1)
        rows = F.embedding(known, self.lora_A) * self.mine(ids < self.lora_A.shape[0]).unsqueeze(-1)
        return output + (self.like_output(rows) @ self.lora_B.t() * self.low_rank.scale).to(output.dtype)

    def moved(self) -> bool:
        """A trained embedding update has a non-zero A."""
        return bool(self.lora_A.detach().any())


class LoRA(PEFT):
    """Low-rank updates of the attention and MLP linears, and of embedding and output layer when named.

    Args:
        name: Unique name of this adapter in its model.
        target_modules: Names or ``*`` patterns of linears; default ``linear_qkv, linear_proj, linear_fc1, linear_fc2``;
            also ``word_embeddings``, ``output_layer`` and cross attention's ``linear_q`` and ``linear_kv``. Every
            pattern must match.
        dim: Rank r.
        alpha: The update is scaled by alpha / dim.
        dropout: Probability of dropping a value before A (``dropout_position="pre"``) or after B (``"post"``).
        dropout_position: ``pre`` or ``post``.
        lora_A_init_method: ``xavier`` (uniform, of the full matrix), ``xavier_normal``, ``kaiming`` (as HF PEFT),
            ``normal`` or ``zero``.
        lora_B_init_method: The same names; ``zero`` makes a fresh adapter the identity.
        use_rslora: Scale by alpha / sqrt(dim) instead (arXiv 2312.03732).
        lr_ratio_B: Learning rate of B over that of A (LoRA+, arXiv 2402.12354).
        rank_pattern: Other ranks for some sites, e.g. ``{"layers.0.mlp.linear_fc1": 4}``; the first match counts.
        alpha_pattern: Other alphas, likewise.
        share_experts: In a mixture of experts, one pair A, B for all experts of a layer; default one pair per expert.
        layers: Global indices of the layers to adapt, or those of each part, e.g. ``{"decoder": [0, 1]}``; default all.
    """

    default_lr = 2e-4
    usual_targets: ClassVar[list[str]] = DEFAULT_TARGETS

    def __init__(
        self,
        name: str = "lora",
        target_modules: Optional[list[str]] = None,
        dim: int = 32,
        alpha: int = 32,
        dropout: float = 0.0,
        dropout_position: str = "pre",
        lora_A_init_method: str = "xavier",
        lora_B_init_method: str = "zero",
        use_rslora: bool = False,
        lr_ratio_B: float = 1.0,
        rank_pattern: Optional[dict[str, int]] = None,
        alpha_pattern: Optional[dict[str, int]] = None,
        share_experts: bool = False,
        layers: LayerChoice = None,
    ) -> None:
        super().__init__(name, layers)
        self.target_modules = target_modules
        if target_modules is not None and not target_modules:
            raise ConfigError(f"{self}: target_modules is empty; name some or leave it out for {self.usual_targets}.")
        self.dim, self.alpha = self.count("dim", dim), self.positive("alpha", alpha)
        self.dropout = self.probability("dropout", dropout)
        self.dropout_position = self.one_of("dropout_position", dropout_position, ("pre", "post"))
        self.lora_A_init_method = self.one_of("lora_A_init_method", lora_A_init_method, INITIALIZERS)
        self.lora_B_init_method = self.one_of("lora_B_init_method", lora_B_init_method, INITIALIZERS)
        if lora_A_init_method == lora_B_init_method == "zero":
            raise ConfigError(f"{self}: A and B both start at zero, so neither would ever train; start one at random.")
        self.use_rslora, self.lr_ratio_B = use_rslora, self.positive("lr_ratio_B", lr_ratio_B)
        self.rank_pattern, self.alpha_pattern = rank_pattern, alpha_pattern
        self.share_experts = self.switch("share_experts", share_experts)
        for pattern, rank in (rank_pattern or {}).items():
            self.count(f"rank_pattern[{pattern!r}]", rank)
        for pattern, other in (alpha_pattern or {}).items():
            self.positive(f"alpha_pattern[{pattern!r}]", other)

    def find(self, host: Host) -> list[Site]:
        """Return the linears (and embedding) that the targets name, in front of them experts that share factors."""
        updates = [update for site in host.sites() for update in self.updates(site, host)]
        chosen = host.select(updates, self.targets(host), self.layers, str(self))
        self._check_patterns([self.plan_name(update) for update in chosen], host)
        sites = list(dict.fromkeys(update.site for update in chosen))
        return [*self._sharing(updates, chosen, host), *sites] if self.share_experts else sites

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build what stands at one site."""
        if _experts_of(site.name) == site.name:
            return SharedFactors(birth, self._shared_plans(site, host), Region.of(host.config).partial)
        return self.adapter(birth, self._chosen_at(site, host), host)

    def updates(self, site: Site, host: Host) -> list[Update]:
        """Return what a target may name at a module: the module, if it is a linear or an embedding."""
        if is_embedding(site.module):
            return [Update(site.name, site, None)]
        return [Update(site.name, site, cut_of(site, host))] if is_linear(site.module) else []

    def targets(self, host: Host) -> list[str]:
        """Return the names and patterns of what is updated in this model."""
        return self.target_modules or self.usual_targets

    def adapter(self, birth: Birth, updates: Sequence[Update], host: Host) -> Adapter:
        """Build the adapter of one module with these updates."""
        (update,) = updates
        site, plan = update.site, self.low_rank(self.plan_name(update))
        if update.cut is None:
            return LoRAEmbedding(birth, site.module, plan, host.vocab_size, host.config.hidden_size)
        lender = self.lender(site, host)
        return LoRALinear(birth, site.module, update.cut, plan, lender, "" if lender is None else f"{update.leaf}_")

    def lender(self, site: Site, host: Host) -> Lender | None:
        """Return what finds the factors that an expert's linear has in common with the other experts', if it has."""
        if not (self.share_experts and site.in_expert):
            return None
        path = f"{_experts_of(site.path)}.adapters.{self.name}"
        return partial(host.chunks[site.chunk].get_submodule, path)

    def plan_name(self, update: Update) -> str:
        """Return the name by which rank and alpha of an update are chosen: of all experts where they share one."""
        return update.plan_name if self.share_experts else update.name

    def low_rank(self, site_name: str) -> LowRank:
        """Return rank and scale of the site, after ``rank_pattern`` and ``alpha_pattern``."""
        dim, alpha = self.rank_and_alpha(site_name)
        scale = alpha / dim**0.5 if self.use_rslora else alpha / dim
        init = self.lora_A_init_method, self.lora_B_init_method
        return LowRank(dim, scale, self.dropout, self.dropout_position, *init)

    def rank_and_alpha(self, site_name: str) -> tuple[int, float]:
        """Return rank and alpha of the site (of all experts, if they share), after the two patterns."""
        name = unnumbered(site_name) if self.share_experts else site_name
        return _first(self.rank_pattern, name, self.dim), _first(self.alpha_pattern, name, self.alpha)

    def summary(self) -> str:
        """Return the rank and the factor on the update beside method and name; patterns may say otherwise by site."""
        dim, scale = self.dim, self.alpha / (self.dim**0.5 if self.use_rslora else self.dim)
        return f"{self} (rank {dim}, scale {scale:.3g})"

    def lr_scale(self, parameter_name: str) -> float:
        """LoRA+: B's share of the learning rate."""
        return self.lr_ratio_B if parameter_name.endswith("lora_B") else 1.0

    def _chosen_at(self, site: Site, host: Host) -> list[Update]:
        targets = self.targets(host)
        return [u for u in self.updates(site, host) if any(matches(target, u.name) for target in targets)]

    def _sharing(self, updates: Sequence[Update], chosen: Sequence[Update], host: Host) -> list[Site]:
        """Return the modules that hold experts with updates; raises ConfigError unless all or none of a layer have."""
        shared = host.everywhere(u.plan_name for u in chosen if u.in_expert)
        if not shared:
            raise ConfigError(f"{self}: share_experts=True, but no target is a linear of an expert; leave it out.")
        left = {u.name for u in updates if u.plan_name in shared} - {u.name for u in chosen}
        for name in host.everywhere(left):
            raise ConfigError(
                f"{self}: share_experts=True gives all experts of a layer one update, but the targets leave out "
                f"{name}; name the linear of every expert."
            )
        wanted = {(u.site.chunk, _experts_of(u.site.path)) for u in chosen if u.in_expert}
        return [site for site in host.sites() if (site.chunk, site.path) in wanted]

    def _shared_plans(self, experts: Site, host: Host) -> dict[str, tuple[Cut, LowRank]]:
        inside = [s for s in host.sites() if s.chunk == experts.chunk and s.path.startswith(f"{experts.path}.")]
        updates = [u for site in inside for u in self._chosen_at(site, host)]
        return {u.leaf: (u.cut, self.low_rank(u.plan_name)) for u in updates if u.cut is not None}

    def _check_patterns(self, names: list[str], host: Host) -> None:
        known = host.everywhere(names)
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field) or {}:
                if not any(matches(pattern, n) for n in known):
                    raise ConfigError(f"{self}: {field} {pattern!r} matches no site; {suggest(pattern, known)}")


def unnumbered(name: str) -> str:
    """Return a name without the number of the expert in it: of what all experts of a layer have in common."""
    return _LOCAL_EXPERT.sub("", name)


def _first(patterns: dict[str, int] | None, name: str, default: int) -> int:
    return next((value for pattern, value in (patterns or {}).items() if matches(pattern, name)), default)


def _experts_of(name: str) -> str:
    """Return the name of the module that holds all experts, of which ``name`` is one, or belongs to one."""
    head, found, _ = f"{name}.".partition(".experts.")
    return f"{head}{found}".rstrip(".") if found else ""
