"""The one wrapper: a base module and the adapters grafted onto it.

The wrapper *adopts* the base's parameters, buffers and children under their own names and keeps the base itself
out of the module tree. So ``named_parameters()``, ``state_dict()`` and ``sharded_state_dict()`` have the same base
keys with and without adapters, and only ``adapters.<name>.`` keys are new.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from graftwork.core.layers import shared_norm
from graftwork.peft.adapter import Adapter, Inner, Offsets

_ORIGINALS = "graftwork_originals"


class AdaptedModule(nn.Module):
    """``base`` with named adapters around it, inner to outer in the order in which they were added.

    ``originals`` holds the base's own tensors by name while adapters are merged into them.
    """

    base: nn.Module
    originals: dict[str, Tensor]

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.__dict__ |= {
            "base": base,  # not registered: a registered child would rename the base's parameters
            "training": base.training,
            "_parameters": base._parameters,
            "_buffers": base._buffers,
            "_non_persistent_buffers_set": base._non_persistent_buffers_set,
            "_modules": dict(base._modules),
            "originals": {},
        }
        base.__dict__[_ORIGINALS] = self.originals  # for adapters, which know the base only
        self.adapters = nn.ModuleDict()

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the base through every active adapter; the last one added is the outermost."""
        call: Inner = self.base
        for adapter in self.active():
            call = partial(adapter, call)
        with shared_norm(self.base):
            return call(*args, **kwargs)

    def active(self) -> Iterator[Adapter]:
        """Yield the adapters that are switched on and not merged."""
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            if adapter.enabled and not adapter.merged:
                yield adapter

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Return an attribute of the wrapper or of the base, of whatever type; annotated as torch annotates it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__:  # half made, by copy.deepcopy
                raise
            found: Tensor | nn.Module = getattr(self.__dict__["base"], name)
            return found

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        """Set a child, or an attribute such as ``training``, also on the base, which is outside the module tree."""
        super().__setattr__(name, value)
        base = self.__dict__.get("base")
        if base is not None and (name in base._modules or name in base.__dict__):
            setattr(base, name, value)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        self.base._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: object) -> None:
        # the base would call the adapters' keys unexpected
        own = {k: v for k, v in state_dict.items() if not k.startswith(f"{prefix}adapters.")}
        self.base._load_from_state_dict(own, prefix, *args)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, object] | None = None
    ) -> ShardedStateDict:
        """Return the base's sharded state under its own keys, plus every adapter's."""
        places = cast("tuple[tuple[int, int, int]]", sharded_offsets)  # so annotated; megatron-core passes any number
        state = dict(sharded_state_dict_default(self.base, prefix, places, metadata))
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, Adapter)
            state.update(adapter.sharded_state_dict(f"{prefix}adapters.{name}.", sharded_offsets, metadata))
        return state


def innermost(module: nn.Module) -> nn.Module:
    """Return the base under a wrapper, or ``module`` itself."""
    return module.base if isinstance(module, AdaptedModule) else module


def original_weight(base: nn.Module) -> Tensor:
    """Return the weight that ``base`` has without the adapters that are merged into it."""
    originals: dict[str, Tensor] = base.__dict__.get(_ORIGINALS, {})
    weight = originals.get("weight", base.weight)
    assert isinstance(weight, Tensor)
    return weight


def graft(root: nn.Module, path: str, name: str, adapter: Adapter) -> AdaptedModule:
    """Put ``adapter`` around the module at ``path`` of ``root``, wrapping the module if it is still bare."""
    parent, leaf = _parent(root, path)
    module = getattr(parent, leaf)
    if not isinstance(module, AdaptedModule):
        module = AdaptedModule(module)
        setattr(parent, leaf, module)
    module.adapters[name] = adapter
    return module


def ungraft(root: nn.Module, path: str, name: str) -> None:
    """Take adapter ``name`` off the module at ``path``; the wrapper goes with its last adapter."""
    parent, leaf = _parent(root, path)
    module = getattr(parent, leaf)
    del module.adapters[name]
    if not len(module.adapters):
        setattr(parent, leaf, module.base)


def adapted_modules(root: nn.Module) -> list[tuple[str, AdaptedModule]]:
    """List ``(path, wrapper)`` for every grafted module below ``root``."""
    return [(path, m) for path, m in root.named_modules() if isinstance(m, AdaptedModule)]


def _parent(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    head, _, leaf = path.rpartition(".")
    return root.get_submodule(head), leaf


def parameter_device(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter (CPU when it has none)."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
