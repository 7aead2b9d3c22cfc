"""DoRA: a low-rank update of a weight's direction, and its magnitude row by row (Liu et al. 2024, arXiv 2402.09353)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor, nn

from graftwork.core.layers import normalized_input
from graftwork.errors import ConfigError, MatchError
from graftwork.parallel.record import record_of
from graftwork.peft.adapter import Adapter, Birth, Inner, Product
from graftwork.peft.cuts import OUTPUT, Cut, drop
from graftwork.peft.method import LayerChoice
from graftwork.peft.methods.lora import LoRA, LoRALinear, LowRank, Update
from graftwork.peft.sites import Host, Site
from graftwork.peft.wrapper import original_weight

EMBEDDING = "word_embeddings"


class DoRALinear(LoRALinear):
    """``y = m / |W + sBA| * (W + sBA) x + b``, m [out] born as ``|W + sBA|``; norms are of rows, without a gradient.

    W is the base's own weight, also while other adapters are merged into it. With dropout, training follows Hugging
    Face PEFT: ``y = W x + b + (m / |W + sBA| - 1) W d + m / |W + sBA| * sBA d`` where d is x with values dropped, which
    costs a second product with W.
    """

    magnitude: nn.Parameter

    def __init__(self, birth: Birth, base: nn.Module, cut: Cut, low_rank: LowRank) -> None:
        super().__init__(birth, base, cut, low_rank)
        self.derive_parameter("magnitude", cut.output_vector(), self.norm, partial=cut.output_partial)

    def norm(self) -> Tensor:
        """Return ``|W + sBA|`` of this rank's rows; collective where rows are cut."""
        A, B = self.factors
        return self.cut.norm(original_weight(self.base), (B.detach() * self.low_rank.scale, A))

    def scale(self) -> Tensor:
        """Return ``m / |W + sBA|`` of this rank's rows in fp32; 1 for a row of zeros (of a padded vocabulary)."""
        return rescaling(self.magnitude, self.norm())

    def forward(self, inner: Inner, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor | None, ...]:
        """Scale the sum of the first output of ``inner``, without a bias, and the update."""
        with _bias_apart(self.base) as apart:
            output, bias, *rest = inner(x, *args, **kwargs)
        scale, x = self.scale(), normalized_input(self.base, x)
        if self.training and self.low_rank.dropout:
            changed = output + self._change(x, scale).to(output.dtype)
        else:  # the scale stays fp32: rounded to bf16 it could not leave 1 in steps of less than 0.4 %
            changed = ((output + self.update(x).to(output.dtype)) * scale).to(output.dtype)
        result = self.chosen(changed, output)
        return (result + bias, None, *rest) if apart and bias is not None else (result, bias, *rest)

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = m / |W + sBA| * (W + sBA), whatever inner adapters have made of W; the bias is not scaled."""
        changed, bias = super().merged_weights(weight, bias)
        return changed * self.scale()[:, None], bias

    def products(self) -> list[Product]:
        """None: the lengths of the rows change too."""
        return []

    def _change(self, x: Tensor, scale: Tensor) -> Tensor:
        dropped = drop(x, self.low_rank.dropout, True, self.cut.inputs_differ)
        return (scale - 1) * self.cut.product(dropped, original_weight(self.base)) + scale * self.product(dropped)


class DoRA(LoRA):
    """LoRA that also learns the length of every row of the weight; like LoRA it costs nothing once merged.

    Args:
        name: Unique name of this adapter in its model.
        target_modules: Names or ``*`` patterns of linears; default ``linear_qkv, linear_proj, linear_fc1, linear_fc2``;
            also an untied ``output_layer``, and cross attention's ``linear_q`` and ``linear_kv``. Every pattern must
            match.
        dim: Rank r.
        alpha: The update is scaled by alpha / dim.
        dropout: Probability of dropping a value before A, and before W where the magnitude acts.
        lora_A_init_method: ``xavier`` (uniform, of the full matrix), ``xavier_normal``, ``kaiming`` (as HF PEFT),
            ``normal`` or ``zero``.
        lora_B_init_method: The same names; ``zero`` makes a fresh adapter the identity.
        use_rslora: Scale by alpha / sqrt(dim) instead (arXiv 2312.03732).
        lr_ratio_B: Learning rate of B over that of A and of the magnitudes (LoRA+, arXiv 2402.12354).
        rank_pattern: Other ranks for some sites, e.g. ``{"layers.0.mlp.linear_fc1": 4}``; the first match counts.
        alpha_pattern: Other alphas, likewise.
        layers: Global indices of the layers to adapt, or those of each part, e.g. ``{"decoder": [0, 1]}``; default all.
    """

    def __init__(
        self,
        name: str = "dora",
        target_modules: Optional[list[str]] = None,
        dim: int = 32,
        alpha: int = 32,
        dropout: float = 0.0,
        lora_A_init_method: str = "xavier",
        lora_B_init_method: str = "zero",
        use_rslora: bool = False,
        lr_ratio_B: float = 1.0,
        rank_pattern: Optional[dict[str, int]] = None,
        alpha_pattern: Optional[dict[str, int]] = None,
        layers: LayerChoice = None,
    ) -> None:
        super().__init__(
            name=name,
            target_modules=target_modules,
            dim=dim,
            alpha=alpha,
            dropout=dropout,
            lora_A_init_method=lora_A_init_method,
            lora_B_init_method=lora_B_init_method,
            use_rslora=use_rslora,
            lr_ratio_B=lr_ratio_B,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            layers=layers,
        )
        if any(target.rpartition(".")[2] == EMBEDDING for target in target_modules or ()):
            raise ConfigError(f"{self}: {EMBEDDING} is no linear whose rows have a magnitude; use a LoRA for it.")

    def updates(self, site: Site, host: Host) -> list[Update]:
        """Return what a target may name at a module: the module, if it is a linear."""
        return [update for update in super().updates(site, host) if update.cut is not None]

    def adapter(self, birth: Birth, updates: Sequence[Update], host: Host) -> Adapter:
        """Build the adapter of one linear; raises MatchError where the base ties its weight to the embedding's."""
        (update,) = updates
        module, plan = update.site.module, self.low_rank(update.name)
        weight = getattr(module, "weight", None)
        if weight is None or record_of(weight).copy:
            raise MatchError(
                f"{self} cannot stand at {OUTPUT}: its weight is tied to the word embedding's; use a LoRA for it."
            )
        assert update.cut is not None
        return DoRALinear(birth, module, update.cut, plan)


def rescaling(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return what brings rows of length ``norm`` to their ``magnitude``; 1 for a row of zeros."""
    return torch.where(norm > 0, magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny), 1.0)


@contextmanager
def _bias_apart(base: nn.Module) -> Iterator[bool]:
    """Let ``base`` hand its bias on instead of adding it, inside the block; tell whether it would have added one."""
    if getattr(base, "bias", None) is None or getattr(base, "skip_bias_add", True):
        yield False
        return
    base.__dict__["skip_bias_add"] = True
    try:
        yield True
    finally:
        base.__dict__["skip_bias_add"] = False
