"""Selective: tensors of the base itself are trained, e.g. biases (BitFit, Ben Zaken et al. 2022, arXiv 2106.10199)."""

from typing import Optional

from graftwork.errors import ConfigError, quoted
from graftwork.peft.method import PEFT, LayerChoice
from graftwork.peft.sites import BaseTensor, Host, Site, matches

DEFAULT_PATTERNS = ["bias"]
NORM = "norm"
FUSED, APART = ".layer_norm_", ".layer_norm."
"""A norm inside of the linear behind it goes by the name of a module too: ``linear_qkv.layer_norm.bias``."""


class Selective(PEFT):
    """The base's own biases (BitFit), norms or any other of its tensors, trained in place and saved in full.

    Args:
        name: Unique name of this adapter in its model.
        patterns: ``bias`` (every bias, those of norms too; the default), ``norm`` (all of every norm), a tensor
            (``linear_qkv.bias``), a module, which means every tensor inside of it (``final_layernorm``,
            ``layers.3.mlp``, ``linear_qkv.layer_norm``), or a ``*`` pattern over the full name of either. Every pattern
            must match.
        layers: Global indices of the layers to train, or those of each part, e.g. ``{"decoder": [0, 1]}``; default all,
            and what lies outside of the layers.
    """

    default_lr = 1e-3

    def __init__(
        self,
        name: str = "selective",
        patterns: Optional[list[str]] = None,
        layers: LayerChoice = None,
    ) -> None:
        super().__init__(name, layers)
        self.patterns = patterns
        if patterns is not None and not patterns:
            raise ConfigError(f"{self}: patterns is empty; name some tensors or leave it out for {DEFAULT_PATTERNS}.")
        for pattern in patterns or ():
            if not isinstance(pattern, str) or not pattern:
                raise ConfigError(f"{self}: patterns must hold names of tensors, got {quoted(pattern)}.")

    def find(self, host: Host) -> list[Site]:
        """Return nothing: no module is wrapped."""
        return []

    def selects(self, host: Host) -> list[BaseTensor]:
        """Return the tensors that the patterns name."""
        return host.select(host.tensors(), self.patterns or DEFAULT_PATTERNS, self.layers, str(self), names_tensor)


def names_tensor(pattern: str, name: str) -> bool:
    """Tell whether ``pattern`` means the tensor ``name``: the tensor, a module that holds it, or all norms."""
    apart = name.replace(FUSED, APART).split(".")
    if pattern == NORM:
        return apart[-2].endswith(NORM)
    called = [name, *(".".join(apart[:end]) for end in range(1, len(apart) + 1))]
    return any(matches(pattern, one) for one in called)
