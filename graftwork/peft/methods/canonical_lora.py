"""Canonical LoRA: an update for each linear that a model was published with, also where the base has fused them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.layers import normalized_input
from graftwork.parallel.fused import Parts
from graftwork.peft.adapter import Adapter, Birth, Inner, Product
from graftwork.peft.cuts import GATED, Cut, cut_of, drop, is_linear, parts_of
from graftwork.peft.method import LayerChoice
from graftwork.peft.methods.lora import Lender, LoRA, LowRank, LowRankAdapter, Update
from graftwork.peft.sites import Host, Site

GATE, UP = "linear_fc1_gate", "linear_fc1_up"
TARGETS = ["linear_q", "linear_k", "linear_v", "linear_proj", GATE, UP, "linear_fc2"]


class FusedLoRA(LowRankAdapter):
    """Updates of linears that were fused into one, each with an A [r, in] and B [its rows, r] of its own.

    The As are applied as one matrix, so that their results cross tensor-parallel ranks in one message; each B's
    result is added to the rows of its own linear. Dropout before A drops the same values for all of them.
    """

    def __init__(
        self,
        birth: Birth,
        base: nn.Module,
        parts: Parts,
        plans: Mapping[str, tuple[Cut, LowRank]],
        lender: Lender | None,
    ) -> None:
        first, _ = next(iter(plans.values()))
        super().__init__(birth, base, first, lender)
        self.parts, self.plans = parts, {name: plan for name, (_, plan) in plans.items()}
        for name, (cut, plan) in plans.items():
            self.new_factors(plan, cut, f"{name}_")

    def forward(self, inner: Inner, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor | None, ...]:
        """Add each update to its rows of the first output of ``inner``."""
        output, *rest = inner(x, *args, **kwargs)
        updates = self.update(normalized_input(self.base, x))
        changed = self.parts.add(output, {name: update.to(output.dtype) for name, update in updates.items()})
        return (self.chosen(changed, output), *rest)

    def update(self, x: Tensor) -> dict[str, Tensor]:
        """Return scale * B A x of every linear for what the base multiplies, x [s, b, in]."""
        plan, cut = next(iter(self.plans.values())), self.cut
        if plan.dropout and plan.dropout_position == "pre":
            x = drop(x, plan.dropout, self.training, cut.inputs_differ)
        stacked = torch.cat([self.factor(f"{name}_lora_A") for name in self.plans])
        low = cut.between(F.linear(x, stacked.to(x.dtype))).split([p.dim for p in self.plans.values()], dim=-1)
        return {name: self._out(name, part) for name, part in zip(self.plans, low)}

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = W + scale * B A on each linear's rows of this rank's part, in fp32."""
        changes = {
            name: plan.scale * (self.factor(f"{name}_lora_B").float() @ self.factor(f"{name}_lora_A").float())
            for name, plan in self.plans.items()
        }
        return self.parts.add(weight, changes, dim=0), bias

    def products(self) -> list[Product]:
        """The update of every linear, each on rows of its own."""
        return [product for name, plan in self.plans.items() for product in self.own_product(plan, f"{name}_")]

    def moved(self) -> bool:
        """A trained update has a non-zero B (or did not start from zero)."""
        return any(
            plan.init_B != "zero" or bool(self.factor(f"{name}_lora_B").detach().any())
            for name, plan in self.plans.items()
        )

    def _out(self, name: str, low: Tensor) -> Tensor:
        plan, B = self.plans[name], self.factor(f"{name}_lora_B")
        out = F.linear(low * plan.scale, B.to(low.dtype))
        if plan.dropout and plan.dropout_position == "post":
            out = drop(out, plan.dropout, self.training, self.cut.outputs_differ)
        return out


class CanonicalLoRA(LoRA):
    """LoRA with a pair of factors for each of q, k, v, gate and up, as Hugging Face PEFT has them.

    Args:
        name: Unique name of this adapter in its model.
        target_modules: Names or ``*`` patterns of linears as they were before they were fused: ``linear_q``,
            ``linear_k``, ``linear_v`` (of self and cross attention), ``linear_proj``, ``linear_fc1_gate``,
            ``linear_fc1_up``, ``linear_fc2``; default all of these. A plain MLP's first linear is ``linear_fc1_up``.
            Also ``word_embeddings`` and ``output_layer``. Every pattern must match.
        dim: Rank r.
        alpha: The update is scaled by alpha / dim.
        dropout: Probability of dropping a value before A (``dropout_position="pre"``) or after B (``"post"``).
        dropout_position: ``pre`` or ``post``.
        lora_A_init_method: ``xavier`` (uniform, of the full matrix), ``xavier_normal``, ``kaiming`` (as HF PEFT),
            ``normal`` or ``zero``.
        lora_B_init_method: The same names; ``zero`` makes a fresh adapter the identity.
        use_rslora: Scale by alpha / sqrt(dim) instead (arXiv 2312.03732).
        lr_ratio_B: Learning rate of B over that of A (LoRA+, arXiv 2402.12354).
        rank_pattern: Other ranks for some linears, e.g. ``{"self_attention.linear_q": 4}``; the first match counts.
        alpha_pattern: Other alphas, likewise.
        share_experts: In a mixture of experts, one pair A, B for all experts of a layer; default one pair per expert.
        layers: Global indices of the layers to adapt, or those of each part, e.g. ``{"decoder": [0, 1]}``; default all.
    """

    usual_targets: ClassVar[list[str]] = TARGETS

    def __init__(
        self,
        name: str = "canonical_lora",
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
        super().__init__(
            name,
            target_modules,
            dim,
            alpha,
            dropout,
            dropout_position,
            lora_A_init_method,
            lora_B_init_method,
            use_rslora,
            lr_ratio_B,
            rank_pattern,
            alpha_pattern,
            share_experts,
            layers,
        )

    def updates(self, site: Site, host: Host) -> list[Update]:
        """Return what a target may name at a module: the linears fused into it, or the one that it is."""
        if not is_linear(site.module):
            return super().updates(site, host)
        cut, parts, stem = cut_of(site, host), parts_of(site, host), site.name.removesuffix(site.leaf)
        if parts is None:
            return [Update(f"{stem}{UP}" if site.leaf == GATED else site.name, site, cut)]
        return [Update(f"{stem}{name}", site, cut.part(rows)) for name, rows in parts.rows(cut.outputs).items()]

    def targets(self, host: Host) -> list[str]:
        """Return the names and patterns of what is updated; by default a plain MLP's gate is left out."""
        gated = host.config.gated_linear_unit
        return self.target_modules or [target for target in self.usual_targets if gated or target != GATE]

    def adapter(self, birth: Birth, updates: Sequence[Update], host: Host) -> Adapter:
        """Build the adapter of one module with these updates."""
        site = updates[0].site
        parts = parts_of(site, host)
        if parts is None:
            return super().adapter(birth, updates, host)
        plans = {u.leaf: (u.cut, self.low_rank(self.plan_name(u))) for u in updates if u.cut is not None}
        return FusedLoRA(birth, site.module, parts, plans, self.lender(site, host))
