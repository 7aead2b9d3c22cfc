"""A LightningModule that adapters can be grafted onto: the same interface for every model family."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from graftwork.compat.collective import agree
from graftwork.errors import ArtifactError, ConfigError, GraftworkError, suggest
from graftwork.peft import METHODS, PEFT, artifact, report
from graftwork.peft.host import Host
from graftwork.peft.stack import Stack
from graftwork.virtual_tokens import PromptLayout


class Adaptable(pl.LightningModule):
    """Adapters of a model: add, load, save, switch, merge, delete.

    Before the megatron-core module exists (a trainer builds it in ``configure_model``) requests are queued in order
    and carried out once the base weights are in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stack: Stack | None = None
        self._queue: list[tuple[str, tuple, dict[str, Any]]] = []

    # ---- what a model family supplies ----------------------------------------------------------------------------

    @property
    def chunks(self) -> list[nn.Module]:
        """This rank's megatron-core modules; empty before ``configure_model``."""
        return []

    def host(self) -> Host:
        """Return the model as transforms see it."""
        raise TypeError(f"{type(self).__name__} must describe itself to transforms.")

    def base_identity(self) -> artifact.Base:
        """Return what an artifact remembers of this base."""
        raise TypeError(f"{type(self).__name__} must name its base.")

    # ---- adapters ------------------------------------------------------------------------------------------------

    @property
    def stack(self) -> Stack:
        """The attached adapters; made with the module."""
        if self._stack is None:
            if not self.chunks:
                raise ConfigError("The model is not built yet: call model.configure_model() or pass it to a trainer.")
            self._stack = Stack(self.host())
        return self._stack

    @property
    def adapters(self) -> dict[str, PEFT]:
        """Attached (or queued) transforms by name."""
        queued = {t.name: t for kind, (t, *_), _ in self._queue if kind == "add"}
        return {**(self._stack.transforms if self._stack else {}), **queued}

    @property
    def prompt_layout(self) -> PromptLayout:
        """Virtual tokens of the attached prompt adapters; empty while adapters are disabled."""
        return self._stack.layout if self._stack else PromptLayout()

    def add_adapter(self, transforms: PEFT | Sequence[PEFT], trainable: bool = True) -> None:
        """Freeze the base and attach one transform or a list, inner to outer; adding one again is a no-op.

        Adapters already attached stay as they are. Raises MatchError when a name is taken or a target matches nothing.
        """
        for transform in [transforms] if isinstance(transforms, PEFT) else transforms:
            if self.adapters.get(transform.name) is transform:
                continue
            if self.chunks:
                self.stack.add(transform, trainable)
            else:
                self._queue.append(("add", (transform, trainable), {}))

    def load_adapters(
        self,
        path: str | Path,
        names: Sequence[str] | None = None,
        trainable: bool = True,
        check_base: bool = True,
    ) -> None:
        """Attach the adapters of an artifact (default all) with their trained values.

        Adapters of the same name, method and hyper-parameters that are attached already get the values. Raises
        ArtifactError (one sentence) and leaves the model as it was when the artifact does not fit.
        """
        if not self.chunks:
            options = {"names": names, "trainable": trainable, "check_base": check_base}
            self._queue.append(("load", (path,), options))
            return
        error, config = None, {}
        try:
            config = artifact.read_config(path)
            if check_base:
                artifact.check_base(config, self.base_identity(), path)
        except GraftworkError as refused:
            error = refused
        agree(error)
        self._attach_loaded(path, _chosen(config, names, path), trainable)

    def save_adapters(
        self,
        path: str | Path,
        names: Sequence[str] | None = None,
        step: int | None = None,
        recipe: str | None = None,
    ) -> Path:
        """Write the named adapters (default all) as one artifact directory, atomically; call it on every rank."""
        if not self.adapters:
            raise ArtifactError("The model has no adapters to save; add one with model.add_adapter(...).")
        return artifact.save(self.stack, path, self.base_identity(), names, step, recipe)

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Make the model its base inside the block; on exit every adapter is as it was."""
        with self.stack.disabled():
            yield

    def merge_adapters(self, names: Sequence[str] | None = None) -> None:
        """Fold adapters (default all) into the base weights; raises MatchError for one that cannot be merged."""
        self.stack.merge(names)

    def unmerge_adapters(self) -> None:
        """Restore the base weights bit for bit and make the adapters live again."""
        self.stack.unmerge()

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter from the model; the base and other adapters keep every bit."""
        self.stack.remove(name)

    def train_adapters(self, names: Sequence[str]) -> None:
        """Make exactly the named adapters trainable; the other adapters are kept and frozen."""
        self.stack.train_only(names)

    def adapter_report(self, total_parameters: int) -> str:
        """Return a table of adapter sites with parameter counts."""
        return report.as_text(self.stack, total_parameters)

    def freeze(self) -> "Adaptable":
        """Stop all training: no parameter requires a gradient and the model is in eval mode."""
        if self.chunks:
            super().freeze()
        else:
            self._queue.append(("freeze", (), {}))
        return self

    def _carry_out_queue(self) -> None:
        """Do what was asked before the module existed, in order."""
        queue, self._queue = self._queue, []
        for kind, arguments, options in queue:
            call: Callable[..., Any] = {"add": self.add_adapter, "load": self.load_adapters, "freeze": self.freeze}[
                kind
            ]
            call(*arguments, **options)

    def _attach_loaded(self, path: str | Path, transforms: list[PEFT], trainable: bool) -> None:
        flags = [(p, p.requires_grad) for p in self.parameters()]
        added = []
        try:
            for transform in transforms:
                _check_same(self.adapters.get(transform.name), transform, path)
            for transform in transforms:
                if transform.name not in self.adapters:
                    self.stack.add(transform, trainable)
                    added.append(transform.name)
            artifact.fill(self.stack, path, {t.name: t.name for t in transforms})
        except GraftworkError:
            for name in added:
                self.stack.remove(name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise


def _chosen(config: dict[str, Any], names: Sequence[str] | None, path: str | Path) -> list[PEFT]:
    transforms = []
    for entry in config["adapters"]:
        if entry["method"] not in METHODS:
            raise ArtifactError(f"{str(path)!r} uses method {entry['method']!r}; {suggest(entry['method'], METHODS)}")
        transforms.append(METHODS[entry["method"]](**entry["hyperparameters"]))
    held = {t.name: t for t in transforms}
    for name in names or ():
        if name not in held:
            raise ArtifactError(f"{str(path)!r} has no adapter {name!r}; {suggest(name, held)}")
    return transforms if names is None else [held[n] for n in names]


def _check_same(attached: PEFT | None, loaded: PEFT, path: str | Path) -> None:
    if attached is not None and repr(attached) != repr(loaded):
        raise ArtifactError(
            f"The model already has another adapter named {loaded.name!r}: {attached!r}, while {str(path)!r} "
            f"holds {loaded!r}; delete or rename one of them."
        )
