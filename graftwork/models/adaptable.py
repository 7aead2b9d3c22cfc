"""A LightningModule that adapters can be grafted onto: the same interface for every model family."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from graftwork.errors import ArtifactError, ConfigError, GraftworkError, MatchError, suggest
from graftwork.parallel.collective import agree
from graftwork.peft import PEFT, report
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.fill import fill
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
        queued = {request[1][0].name: request[1][0] for request in self._queue if request[0] == "add"}
        return {**(self._stack.transforms if self._stack else {}), **queued}

    @property
    def prompt_layout(self) -> PromptLayout:
        """Virtual tokens of the attached prompt adapters; empty while adapters are disabled."""
        return self._stack.layout if self._stack else PromptLayout()

    def add_adapter(self, transforms: PEFT | Sequence[PEFT], trainable: bool = True) -> None:
        """Freeze the base and attach one transform or a list, inner to outer; adding one again is a no-op.

        Adapters already attached stay as they are. Raises MatchError when a name is taken or a target matches
        nothing; then none of the list is attached.
        """
        listed = [transforms] if isinstance(transforms, PEFT) else list(transforms)
        new = [t for t in listed if self.adapters.get(t.name) is not t]
        if not self.chunks:
            self._check_names_are_free(new)
            self._queue += [("add", (t, trainable), {}) for t in new]
            return
        with self.stack.all_or_nothing():
            for transform in new:
                self.stack.add(transform, trainable)

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
            artifact.read_everywhere(path)  # a wrong path is told at once
            options = {"names": names, "trainable": trainable, "check_base": check_base}
            self._queue.append(("load", (path,), options))
            return
        config = artifact.read_everywhere(path)
        chosen: list[PEFT] = []
        error: GraftworkError | None = None
        try:
            chosen = self._chosen(config, names, path)
            if check_base:
                artifact.check_base(config, self.base_identity(), path)
        except GraftworkError as refused:
            error = refused
        agree(error)
        with self.stack.all_or_nothing():
            for transform in chosen:
                if transform.name not in self.adapters:
                    self.stack.add(transform, trainable)
            fill(self.stack, path, config, [t.name for t in chosen])
            self.stack.prompt_formats |= artifact.prompt_formats(config, [t.name for t in chosen])

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

    def prompt_format(self, given: Collection[str] = ()) -> dict[str, Any]:
        """Return how the adapters were trained to be asked: templates, BOS and EOS, without the keys ``given``.

        Known after a training on a data module and after loading. Raises ConfigError when adapters differ in it.
        """
        return self._stack.prompt_format(given) if self._stack else {}

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
        """Remove an adapter (or a request for one) from the model; the base and other adapters keep every bit."""
        kept = [request for request in self._queue if request[0] != "add" or request[1][0].name != name]
        if len(kept) < len(self._queue):
            self._queue = kept
        else:
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
        """Do what was asked before the module existed, in order; what fails, and all after it, stays queued."""
        calls: dict[str, Callable[..., Any]] = {
            "add": self.add_adapter,
            "load": self.load_adapters,
            "freeze": self.freeze,
        }
        queue, self._queue = self._queue, []
        for done, (kind, arguments, options) in enumerate(queue):
            try:
                calls[kind](*arguments, **options)
            except GraftworkError:
                self._queue = queue[done:]
                raise

    def _check_names_are_free(self, transforms: Sequence[PEFT]) -> None:
        names = list(self.adapters)
        for transform in transforms:
            if transform.name in names:
                raise MatchError(
                    f"The model already has an adapter named {transform.name!r}; give this "
                    f"{type(transform).__name__} another name or delete the other one first."
                )
            names.append(transform.name)

    def _chosen(self, config: dict[str, Any], names: Sequence[str] | None, path: str | Path) -> list[PEFT]:
        held = {t.name: t for t in artifact.transforms(config, path)}
        for name in names or ():
            if name not in held:
                raise ArtifactError(f"{str(path)!r} has no adapter {name!r}; {suggest(name, held)}")
        chosen = [held[n] for n in (held if names is None else dict.fromkeys(names))]
        for loaded in chosen:
            attached = self.adapters.get(loaded.name)
            if attached is not None and repr(attached) != repr(loaded):
                raise ArtifactError(
                    f"The model already has another adapter named {loaded.name!r}: {attached!r}, while {str(path)!r} "
                    f"holds {loaded!r}; delete or rename one of them."
                )
        return chosen
