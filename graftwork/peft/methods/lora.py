"""LoRA: a low-rank update beside a frozen linear (Hu et al. 2021, arXiv 2106.09685)."""

from dataclasses import dataclass
from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.layers import normalized_input
from graftwork.errors import ConfigError, suggest
from graftwork.peft.adapter import INITIALIZERS, Adapter, Birth, Inner, normal
from graftwork.peft.cuts import Cut, cut_of, drop, is_embedding, is_linear
from graftwork.peft.embedding import EmbeddingLookup
from graftwork.peft.method import PEFT
from graftwork.peft.sites import Host, Site, matches

DEFAULT_TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@dataclass(frozen=True)
class LowRank:
    """Rank, scale, dropout and initial values of one site's update."""

    dim: int
    scale: float
    dropout: float
    dropout_position: str
    init_A: str
    init_B: str


class LoRALinear(Adapter):
    """``y = base(x) + scale * B A x`` with A [r, in] and B [out, r]; x is what the base linear multiplies."""

    mergeable = True
    base: nn.Module
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, birth: Birth, base: nn.Module, cut: Cut, low_rank: LowRank) -> None:
        super().__init__(birth)
        self.__dict__["base"] = base  # read for its fused LayerNorm; it stays where it is in the module tree
        self.cut, self.low_rank = cut, low_rank
        init_A, init_B = INITIALIZERS[low_rank.init_A], INITIALIZERS[low_rank.init_B]
        self.new_parameter("lora_A", cut.input_factor(low_rank.dim), init_A, partial=cut.input_partial)
        self.new_parameter("lora_B", cut.output_factor(low_rank.dim), init_B, partial=cut.output_partial)

    def forward(self, inner: Inner, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor | None, ...]:
        """Add the update to the first output of ``inner`` (megatron-core linears return (output, bias))."""
        output, *rest = inner(x, *args, **kwargs)
        return (output + self.update(x).to(output.dtype), *rest)

    def update(self, x: Tensor) -> Tensor:
        """Return scale * B A x for the base's input x [s, b, in]."""
        plan, cut = self.low_rank, self.cut
        x = normalized_input(self.base, x)
        if plan.dropout and plan.dropout_position == "pre":
            x = drop(x, plan.dropout, self.training, cut.inputs_differ)
        low = cut.between(F.linear(x, self.lora_A.to(x.dtype)))
        out = F.linear(low * plan.scale, self.lora_B.to(x.dtype))  # r values a token to scale, not the whole output
        if plan.dropout and plan.dropout_position == "post":
            out = drop(out, plan.dropout, self.training, cut.outputs_differ)
        return out

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = W + scale * B A on this rank's part, in fp32."""
        return weight + self.low_rank.scale * (self.lora_B.float() @ self.lora_A.float()), bias

    def moved(self) -> bool:
        """A trained LoRA has a non-zero B (or did not start from zero)."""
        return self.low_rank.init_B != "zero" or bool(self.lora_B.detach().any())


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
        rows = F.embedding(known, self.lora_A) * (ids < self.lora_A.shape[0]).unsqueeze(-1)
        return output + (self.like_output(rows) @ self.lora_B.t() * self.low_rank.scale).to(output.dtype)

    def moved(self) -> bool:
        """A trained embedding update has a non-zero A."""
        return bool(self.lora_A.detach().any())


class LoRA(PEFT):
    """Low-rank updates of the attention and MLP linears, and of embedding and output layer when named.

    Args:
        name: Unique name of this adapter in its model.
        target_modules: Names or ``*`` patterns of linears; default ``linear_qkv, linear_proj, linear_fc1, linear_fc2``;
            also ``word_embeddings`` and ``output_layer``. Every pattern must match.
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
        layers: Global indices of the layers to adapt; default all.
    """

    default_lr = 2e-4

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
        layers: Optional[list[int]] = None,
    ) -> None:
        super().__init__(name, layers)
        self.target_modules = target_modules
        if target_modules is not None and not target_modules:
            raise ConfigError(f"{self}: target_modules is empty; name some or leave it out for {DEFAULT_TARGETS}.")
        self.dim, self.alpha = self.count("dim", dim), self.positive("alpha", alpha)
        self.dropout = self.probability("dropout", dropout)
        self.dropout_position = self.one_of("dropout_position", dropout_position, ("pre", "post"))
        self.lora_A_init_method = self.one_of("lora_A_init_method", lora_A_init_method, INITIALIZERS)
        self.lora_B_init_method = self.one_of("lora_B_init_method", lora_B_init_method, INITIALIZERS)
        if lora_A_init_method == lora_B_init_method == "zero":
            raise ConfigError(f"{self}: A and B both start at zero, so neither would ever train; start one at random.")
        self.use_rslora, self.lr_ratio_B = use_rslora, self.positive("lr_ratio_B", lr_ratio_B)
        self.rank_pattern, self.alpha_pattern = rank_pattern, alpha_pattern
        for pattern, rank in (rank_pattern or {}).items():
            self.count(f"rank_pattern[{pattern!r}]", rank)
        for pattern, other in (alpha_pattern or {}).items():
            self.positive(f"alpha_pattern[{pattern!r}]", other)

    def find(self, host: Host) -> list[Site]:
        """Return the linears (and embedding) that the targets name."""
        linears = [s for s in host.sites() if is_linear(s.module) or is_embedding(s.module)]
        chosen = host.select(linears, self.target_modules or DEFAULT_TARGETS, self.layers, str(self))
        self._check_patterns([s.name for s in chosen], host)
        return chosen

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build the update of one site."""
        plan = self.low_rank(site.name)
        if is_embedding(site.module):
            return LoRAEmbedding(birth, site.module, plan, host.vocab_size, host.config.hidden_size)
        return LoRALinear(birth, site.module, cut_of(site, host), plan)

    def low_rank(self, site_name: str) -> LowRank:
        """Return rank and scale of the site, after ``rank_pattern`` and ``alpha_pattern``."""
        dim = _first(self.rank_pattern, site_name, self.dim)
        alpha = _first(self.alpha_pattern, site_name, self.alpha)
        scale = alpha / dim**0.5 if self.use_rslora else alpha / dim
        init = self.lora_A_init_method, self.lora_B_init_method
        return LowRank(dim, scale, self.dropout, self.dropout_position, *init)

    def lr_scale(self, parameter_name: str) -> float:
        """LoRA+: B's share of the learning rate."""
        return self.lr_ratio_B if parameter_name.endswith("lora_B") else 1.0

    def _check_patterns(self, names: list[str], host: Host) -> None:
        known = host.everywhere(names)
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field) or {}:
                if not any(matches(pattern, n) for n in known):
                    raise ConfigError(f"{self}: {field} {pattern!r} matches no site; {suggest(pattern, known)}")


def _first(patterns: dict[str, int] | None, name: str, default: int) -> int:
    return next((value for pattern, value in (patterns or {}).items() if matches(pattern, name)), default)
