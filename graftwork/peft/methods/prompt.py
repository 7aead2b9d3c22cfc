"""P-tuning: virtual tokens whose embeddings come from a small encoder (Liu et al. 2021, arXiv 2103.10385)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.peft.adapter import Adapter, Birth, Inner, normal, zeros
from graftwork.peft.embedding import EmbeddingLookup
from graftwork.peft.method import PEFT
from graftwork.peft.sites import Host, Site
from graftwork.virtual_tokens import PLACEMENTS, VIRTUAL_BASE, PromptSlot


class PromptTable(EmbeddingLookup):
    """Rows for virtual token ids around the word embedding, which never sees such an id.

    ``ids`` [b, s] from ``VIRTUAL_BASE + offset`` to ``+ length`` name the rows; other ids pass to the inner module.
    """

    why_not_mergeable = "virtual tokens are rows that the base does not have"

    def __init__(self, birth: Birth, base: nn.Module, slot: PromptSlot) -> None:
        super().__init__(birth, base)
        self.first = VIRTUAL_BASE + slot.offset
        self.length = slot.length

    def table(self) -> Tensor:
        """Return the [length, hidden] rows."""
        raise TypeError(f"{type(self).__name__} must say how its rows are made.")

    def forward(self, inner: Inner, ids: Tensor) -> Tensor:
        """Look virtual ids up in the table and all others in ``inner``."""
        mine = (ids >= self.first) & (ids < self.first + self.length)
        output = inner(ids.masked_fill(mine, 0))
        rows = F.embedding(self.like_output((ids - self.first).clamp(0, self.length - 1)), self.table())
        return torch.where(self.like_output(mine).unsqueeze(-1), rows.to(output.dtype), output)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the baked table: all that inference needs."""
        with torch.no_grad():
            return {"table": self.table().detach()}


class PromptEncoder(PromptTable):
    """Table = W2 gelu(W1 E + b1) + b2 over learned slot embeddings E [length, e]."""

    slots: nn.Parameter
    linear_in: nn.Parameter
    bias_in: nn.Parameter
    linear_out: nn.Parameter
    bias_out: nn.Parameter

    def __init__(self, birth: Birth, base: nn.Module, slot: PromptSlot, method: "PTuning", hidden_size: int) -> None:
        super().__init__(birth, base, slot)
        init, e, b = normal(method.init_std), method.embedding_dim, method.bottleneck_dim
        self.new_matrix("slots", (slot.length, e), init)
        self.new_matrix("linear_in", (b, e), init)
        self.new_matrix("bias_in", (b,), zeros)
        self.new_matrix("linear_out", (hidden_size, b), init)
        self.new_matrix("bias_out", (hidden_size,), zeros)

    def table(self) -> Tensor:
        """Run the encoder over all slots."""
        return F.linear(F.gelu(F.linear(self.slots, self.linear_in, self.bias_in)), self.linear_out, self.bias_out)

    def moved(self) -> bool:
        """A trained encoder has a non-zero output bias, which starts at zero."""
        return bool(self.bias_out.detach().any())


class PTuning(PEFT):
    """Virtual tokens, embedded by a trained MLP, placed in front of every input.

    Args:
        name: Unique name of this adapter in its model.
        virtual_tokens: Number of virtual tokens.
        embedding_dim: Width of the slot embeddings that the encoder reads.
        bottleneck_dim: Width of the encoder's hidden layer.
        init_std: Standard deviation of the encoder's initial weights.
        placement: ``prefix`` (after BOS), ``before_bos`` (HF PEFT's place) or ``template`` (where a prompt template
            says ``{virtual:NAME}``).
    """

    default_lr = 1e-3

    def __init__(
        self,
        name: str = "ptuning",
        virtual_tokens: int = 10,
        embedding_dim: int = 1024,
        bottleneck_dim: int = 1024,
        init_std: float = 0.023,
        placement: str = "prefix",
    ) -> None:
        super().__init__(name)
        self.virtual_tokens = self.count("virtual_tokens", virtual_tokens)
        self.embedding_dim = self.count("embedding_dim", embedding_dim)
        self.bottleneck_dim = self.count("bottleneck_dim", bottleneck_dim)
        self.init_std = self.positive("init_std", init_std)
        self.placement = self.one_of("placement", placement, PLACEMENTS)

    def find(self, host: Host) -> list[Site]:
        """Return the word embedding (on the first pipeline stage)."""
        return host.select(host.sites(), ["embedding.word_embeddings"], None, str(self))

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build encoder and table."""
        slot = next(s for s in host.prompts.slots if s.name == self.name)
        return PromptEncoder(birth, site.module, slot, self, host.config.hidden_size)

    def prompt_slots(self, offset: int) -> list[PromptSlot]:
        """Return this prompt's virtual ids."""
        return [PromptSlot(self.name, offset, self.virtual_tokens, self.placement)]
