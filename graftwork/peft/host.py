"""What a transform sees of a model: its chunks, sizes and prompts, and how to find and graft sites in it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graftwork.peft.sites import Site, modules_of, select, union
from graftwork.virtual_tokens import PromptLayout


@dataclass(frozen=True)
class Host:
    """A model to adapt.

    ``chunks`` are this rank's megatron-core modules (several under virtual pipelining), ``config`` their
    TransformerConfig, ``vocab_size`` the real (un-padded) vocabulary, ``seed`` fixes every adapter's initial values.
    """

    chunks: Sequence[nn.Module]
    config: Any
    vocab_size: int
    seed: int
    prompts: PromptLayout = field(default_factory=PromptLayout)

    def sites(self) -> list[Site]:
        """Return every module that may be wrapped."""
        return modules_of(self.chunks)

    def select(
        self, sites: Iterable[Site], patterns: Sequence[str], layers: Sequence[int] | None, who: str
    ) -> list[Site]:
        """Return the sites that the patterns name in the selected layers; every pattern must match."""
        return select(sites, patterns, layers, self.config.num_layers, who)

    def everywhere(self, names: Iterable[str]) -> list[str]:
        """Return the union of ``names`` over the whole model: all pipeline stages and experts."""
        return sorted(union(names))
