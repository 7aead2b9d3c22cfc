"""Model: what every family of base models shares, as a LightningModule over megatron-core.

A model *has* its parts: a stack of adapters, requests that wait for it to be built, a validation loss. Its public
methods hand on to them. Whatever only one family does belongs to that family's class.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Optional, Unpack

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from graftwork import parallel
from graftwork.batch import Batch, Ids, Questions
from graftwork.data.tokenizer import TextEncoder, Tokenizer, checkpoint_tokenizer
from graftwork.errors import ArtifactError, CheckpointError, ConfigError, TrainingError
from graftwork.models.adapters import (
    attach,
    load,
    prompt_lengths,
    refuse_long_prompts,
    refuse_taken_names,
    seen,
    warn_of_other_prompts,
)
from graftwork.models.cards import describe
from graftwork.models.exchange.export import Wanted, export_stack
from graftwork.models.exchange.proved import prove as prove_export
from graftwork.models.fitting import ValidationLoss, prompt_format_of, refuse_unfit, schedules_steps, trained_only
from graftwork.models.generation.answers import Answer, answer, refuse_spread_experts
from graftwork.models.generation.decoding import Decoding, Options, generate
from graftwork.models.loss import LossFunction
from graftwork.models.microbatch import Targets, headless
from graftwork.models.pending import Add, Change, Freeze, Load, Pending, Request
from graftwork.models.precision import common_dtype
from graftwork.models.proof import Compared, prove, repeat
from graftwork.models.recompute import recompute_fields
from graftwork.models.shapes import Shape
from graftwork.models.weights import check_checkpoint, export_weights, family_named, fingerprint, load_weights
from graftwork.models.weights.drawn import Draw, draw_all, spread
from graftwork.models.weights.hub import resolve
from graftwork.optim import AdamW
from graftwork.parallel.collective import agreed
from graftwork.peft import PEFT, report
from graftwork.peft import tasks as tasks_of
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.card import NOTHING, Told
from graftwork.peft.sites import Host
from graftwork.peft.stack import Stack
from graftwork.routes import Routes
from graftwork.virtual_tokens import PromptLayout
from graftwork.ways import Way

log = logging.getLogger(__name__)


class Model(pl.LightningModule):
    """A base model that adapters can be grafted onto; a family says how to build a chunk and how to run a microbatch.

    Before the megatron-core module exists (a trainer builds it in ``configure_model``) requests for adapters wait, in
    order, until the base weights are in. ``generation`` holds the options that ``trainer.predict`` generates with.

    Args:
        shape: Its sizes.
        checkpoint: Base weights: a Hugging Face directory, a GGUF file or a known name; None starts at random.
        dtype: ``fp32``, ``bf16`` (bf16 base, fp32 adapters), ``auto`` (what the machine does fast) or None (the
            checkpoint's own).
        recompute: Activation recomputation: ``full``, ``selective`` or None.
        seed: Seed of random base weights and of every adapter's initial values.
    """

    kind: ClassVar[str] = "gpt"
    """What a family calls the models of this class."""
    seq2seq: ClassVar[bool] = False
    """Whether an encoder reads the prompt and a decoder gives the answer; False: one sequence holds both."""

    def __init__(
        self,
        shape: Shape,
        checkpoint: Optional[str] = None,
        dtype: Optional[str] = None,
        recompute: Optional[str] = None,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        _check_kind(self.kind, shape)  # wrong names are told at once
        recompute_fields(recompute)
        self.shape, self.checkpoint, self.dtype_name = shape, checkpoint, dtype
        self.recompute, self.seed = recompute, seed
        self.module: nn.Module | None = None
        self.optim: AdamW | None = None
        self.generation: Options = {}
        self.strict_loading = False  # checkpoints hold only what trains
        self._tokenizer: Tokenizer | None = None
        self._stack: Stack | None = None
        self._pending = Pending()
        self._validation = ValidationLoss()

    # ---- what a family supplies ----------------------------------------------------------------------------------

    def build_chunk(self, config: TransformerConfig, vp_stage: int | None) -> nn.Module:
        """Return this rank's megatron-core module for one (virtual) pipeline stage, its weights not yet filled."""
        raise TypeError(f"{type(self).__name__} must say how it builds a chunk.")

    def run_chunk(self, chunk: nn.Module, batch: Batch) -> Tensor:
        """Call one chunk on a microbatch: logits [b, s, v/tp], or hidden states before the last stage."""
        raise TypeError(f"{type(self).__name__} must say how it runs a chunk.")

    def lay_out(self, prompts: Ids, answers: Ids, device: torch.device) -> Batch:
        """Return how prompts, each with the tokens that follow it, reach the model, with targets on those tokens."""
        raise TypeError(f"{type(self).__name__} must say how prompts and answers reach it.")

    def local(self, batch: Batch) -> Batch:
        """Return this rank's part of a microbatch, laid out as ``run_chunk`` reads it."""
        raise TypeError(f"{type(self).__name__} must say how a microbatch reaches a chunk.")

    def draw(self) -> Draw:
        """Return how random weights are drawn."""
        return partial(spread, self.shape.transformer_config())

    # ---- building ------------------------------------------------------------------------------------------------

    @property
    def chunks(self) -> list[nn.Module]:
        """This rank's megatron-core modules: one, or several under virtual pipelining; none before it is built."""
        if self.module is None:
            return []
        return list(self.module) if isinstance(self.module, nn.ModuleList) else [self.module]

    @property
    def config(self) -> TransformerConfig:
        """megatron-core's TransformerConfig."""
        return _config_of(self.chunks[0])

    @property
    def checkpoint_dir(self) -> Path | None:
        """Directory of the base checkpoint (a GGUF file is converted once), None for random weights."""
        return None if self.checkpoint is None else resolve(self.checkpoint)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, loaded at first use; assign one for a model with random weights."""
        if self._tokenizer is None:
            if self.checkpoint_dir is None:
                raise ConfigError("A model without checkpoint has no tokenizer: set model.tokenizer.")
            self._tokenizer = checkpoint_tokenizer(self.checkpoint_dir)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def prepare(self, optim: AdamW | None = None, seed: int | None = None) -> None:
        """Set what a run decides: the optimizer (None: as it is) and, while the model is not built, its seed."""
        self.optim = optim or self.optim
        if seed is not None and not self.chunks:
            self.seed = seed

    def configure_model(self) -> None:
        """Build the module, fill in the base weights, carry out the requests that wait; idempotent."""
        if self.module is None:
            agreed(self._check_checkpoint)  # before anything is allocated
            self._tell_of_window()
            chunks = self.build()
            self.fill(chunks)
            self.module = nn.ModuleList(chunks) if parallel.vp_size() else chunks[0]
            self.module.train(self.training)
        self._pending.carry_out(self._do)  # also what an earlier call could not do

    def build(self) -> list[nn.Module]:
        """Return this rank's chunks in the current parallel layout (one process where there is none), unfilled."""
        parallel.ensure_initialized(self.seed)
        config = self.shape.transformer_config(**self._transformer_fields())
        parallel.seed_rng(self.seed)
        virtual = parallel.vp_size()
        return [self.build_chunk(config, stage) for stage in (range(virtual) if virtual else [None])]

    def fill(self, chunks: Sequence[nn.Module]) -> None:
        """Fill the base weights: this rank's slices of the checkpoint, or values drawn from the seed."""
        if self.checkpoint_dir is not None:
            agreed(partial(load_weights, chunks, self.shape, self.checkpoint_dir))
        else:
            draw_all(chunks, self.draw(), self.seed)

    def host(self) -> Host:
        """Describe the model to transforms."""
        return Host(self.chunks, self.config, self.shape.vocab_size, self.seed)

    def base_identity(self, like: str | None = None) -> artifact.Base:
        """Family, shape and fingerprint of the base, free of any parallel layout: what an artifact remembers.

        ``like``: the fingerprint that it will be compared with; that of an older version is taken in another way.
        """
        directory = self.checkpoint_dir
        return artifact.Base(
            name=self._base_name(),
            family=self.shape.family,
            shape=dict(sorted(vars(self.shape).items())),
            fingerprint=fingerprint(directory, like) if directory else f"random:{self.seed}",
        )

    def export_hf(self, path: str | Path) -> Path:
        """Write the base weights (merged adapters included) as a Hugging Face directory, from every rank together."""
        export_weights(self.chunks, self.shape, path, source=self.checkpoint_dir)
        return Path(path)

    # ---- adapters ------------------------------------------------------------------------------------------------

    @property
    def stack(self) -> Stack:
        """The attached adapters; made with the module."""
        if self._stack is None:
            if not self.chunks:
                raise ConfigError("The model is not built yet: call model.configure_model() or pass it to a trainer.")
            self._stack = Stack(replace(self.host(), tokenize=self._tokenize))
        return self._stack

    @property
    def adapters(self) -> dict[str, PEFT]:
        """Attached (or queued) transforms by name."""
        return {**(self._stack.transforms if self._stack else {}), **self._pending.transforms}

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
        new = [transform for transform in listed if self.adapters.get(transform.name) is not transform]
        refuse_long_prompts(prompt_lengths(new), self.shape.max_position_embeddings)
        if self.chunks:
            attach(self.stack, new, trainable)
        else:
            refuse_taken_names(new, self.adapters)
            self._pending.put(*(Add(transform, trainable) for transform in new))

    def load_adapters(
        self,
        path: str | Path,
        names: Sequence[str] | None = None,
        trainable: bool = True,
        check_base: bool = True,
    ) -> None:
        """Attach the adapters of an artifact (default all), or one of Hugging Face PEFT, with their trained values.

        Adapters of the same name, method and hyper-parameters that are attached already get the values. That of Hugging
        Face PEFT has no name; it gets the one of its method, or the one in ``names``. Raises ArtifactError (one
        sentence) and leaves the model as it was when the artifact does not fit.
        """
        asked = Load(path, names, trainable, check_base)
        if self.chunks:
            load(self.stack, asked, self.shape, self.base_identity)
        else:
            self._pending.put(replace(asked, checksum=seen(path)))  # a wrong path is told at once

    def save_adapters(
        self,
        path: str | Path,
        names: Sequence[str] | None = None,
        step: int | None = None,
        recipe: str | None = None,
        verify: bool = True,
        told: Told = NOTHING,
    ) -> Path:
        """Write the named adapters (default all) as one artifact directory, atomically; call it on every rank.

        ``verify``: before the directory is there, its adapters are built anew from the files and compared with these
        on a small batch that it then carries as a proof. ``told``: what the card says of the training. Raises
        ArtifactError, and leaves what was there, when they differ.
        """
        if not self.adapters:
            raise ArtifactError("The model has no adapters to save; add one with model.add_adapter(...).")
        proving = partial(prove, self) if verify else None
        return artifact.save(
            self.stack, path, self.base_identity(), names, step, recipe, proving, partial(describe, told)
        )

    def verify_adapters(self, path: str | Path) -> list[Compared]:
        """Repeat the proof of the artifact whose adapters this model holds, in any layout; call it on every rank.

        Raises ArtifactError for an artifact without a proof or with a damaged one.
        """
        return repeat(self, path)

    def export_adapters(
        self,
        path: str | Path,
        format: str = "peft",
        for_: str = "peft",
        names: Sequence[str] | None = None,
        experts: str | None = None,
        verify: bool = True,
    ) -> Path:
        """Write the named adapters (default all) for Hugging Face PEFT, or ``for_="vllm"``; call it on every rank.

        One adapter becomes the directory ``path``, several one directory each inside of it. ``experts`` of a mixture:
        ``parameters`` (all in one, as transformers 5 has them) or ``modules``; default the reader's. ``verify``: before
        it is there, each is read back as any adapter of Hugging Face PEFT and compared with the live one on a small
        batch, which it then carries as a proof. Raises ConfigError for an adapter that has no exact counterpart there,
        ArtifactError when they differ or ``path`` holds anything but an export; what was there is then intact.
        """
        if not self.adapters:
            raise ArtifactError("The model has no adapters to export; add one with model.add_adapter(...).")
        wanted = Wanted(format, for_, names, self._base_name(), experts)
        proving = partial(prove_export, self, self.shape) if verify else None
        return export_stack(self.stack, self.shape, path, wanted, self._adds_bos, proving)

    def prompt_format(self, given: Collection[str] = (), way: Way = None) -> dict[str, Any]:
        """Return how the adapters were trained to be asked: templates, BOS and EOS, without the keys ``given``.

        ``way``: only of those that it names. Known after a training on a data module and after loading. Raises
        ConfigError when adapters differ in it.
        """
        return self._stack.prompt_format(given, way) if self._stack else {}

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Make the model its base inside the block; on exit every adapter is as it was."""
        with self.stack.disabled():
            yield

    def routed(self, routes: Routes | None) -> AbstractContextManager[None]:
        """Send rows to adapters by ``routes`` inside the block; raises MatchError where that cannot be."""
        return self.stack.routed(routes)

    def merge_adapters(self, names: Sequence[str] | None = None) -> None:
        """Fold adapters (default all) into the base weights; raises MatchError for one that cannot be merged."""
        self.stack.merge(names)

    def unmerge_adapters(self) -> None:
        """Restore the base weights bit for bit and make the adapters live again."""
        self.stack.unmerge()

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter (or a request for one) from the model; the base and other adapters keep every bit."""
        if not self._pending.drop(name):
            self.stack.remove(name)

    def train_adapters(self, names: Sequence[str]) -> None:
        """Make exactly the named adapters trainable; the other adapters are kept and frozen."""
        self.stack.train_only(names)

    def add_tasks(self, name: str, tasks: Mapping[str, int], init_text: Optional[Mapping[str, str]] = None) -> None:
        """Give prompt adapter ``name`` further tasks, such as ``{"mood": 10}`` with ten virtual tokens.

        From then on they train and nothing else of the model does, so that earlier tasks keep tensors and logits, bit
        for bit. ``init_text``: their texts, where each task of prompt tuning starts from its own. Raises MatchError or
        ConfigError, and changes nothing, for tasks that are there already or cannot be.
        """
        lengths = {f"{name!r}, task {task!r},": length for task, length in tasks.items()}
        refuse_long_prompts(lengths, self.shape.max_position_embeddings)
        self._change(lambda stack: tasks_of.add_tasks(stack, name, tasks, init_text))

    def remove_task(self, name: str, task: str) -> None:
        """Take a task off prompt adapter ``name``; all others keep every bit."""
        self._change(lambda stack: tasks_of.remove_task(stack, name, task))

    def rename_task(self, name: str, old: str, new: str) -> None:
        """Call a task of prompt adapter ``name`` by another name, in rows and in artifacts."""
        self._change(lambda stack: tasks_of.rename_task(stack, name, old, new))

    def train_tasks(self, name: str, tasks: Sequence[str]) -> None:
        """Make exactly these tasks of prompt adapter ``name`` trainable; other adapters stay as they are."""
        self._change(lambda stack: tasks_of.train_tasks(stack, name, tasks))

    def adapter_report(self, total_parameters: int) -> str:
        """Return a table of adapter sites with parameter counts."""
        return report.as_text(self.stack, total_parameters)

    def freeze(self) -> "Model":
        """Stop all training: no parameter requires a gradient and the model is in eval mode."""
        if self.chunks:
            super().freeze()
        else:
            self._pending.put(Freeze())
        return self

    # ---- answers -------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, **options: Unpack[Decoding]
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt of ids; options as in ``generation.decoding.generate``."""
        return generate(self, prompts, max_new_tokens, **options)

    def answer_batch(self, batch: Questions, **options: Unpack[Options]) -> list[Answer]:
        """Return ``input``, ``output`` and, where known, ``expected`` per prompt; options as in ``generate``."""
        return answer(self, batch, **options)

    def on_predict_start(self) -> None:
        """Warn when the data put their rows to the model in another way than its adapters were trained with."""
        if self._stack is not None:
            warn_of_other_prompts(self._stack, prompt_format_of(self.trainer))

    def predict_step(self, batch: Questions, batch_idx: int = 0) -> list[Answer]:
        """Answer a predict batch: per prompt ``input``, ``output`` and, where it is known, ``expected``."""
        refuse_spread_experts()
        return self.answer_batch(batch, **self.generation)

    # ---- microbatches --------------------------------------------------------------------------------------------

    def forward_step(self, data_iterator: Iterator[Batch], module: nn.Module) -> tuple[Tensor, LossFunction]:
        """megatron-core's ``forward_step_func``: a chunk's hidden states and the function that reads their loss.

        The function returns (sum of the answer tokens' losses, their number, {"loss_sum", "num_tokens"}), so that
        whoever drives the schedule divides once, by the tokens of the whole global batch.
        """
        targets, hidden = self._run(next(data_iterator), module)
        return hidden, targets.loss

    def target_logits(self, batch: Batch) -> Tensor:
        """Return this tensor-parallel rank's logits [n, v/tp] at the targets of a microbatch; one stage only."""
        targets, hidden = self._run(batch, self.chunks[0])
        return targets.logits(hidden)

    # ---- fitting -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the batch's mean answer-token loss (one device; MegatronStrategy drives its own steps)."""
        loss_sum, count = self._loss(batch)
        if not count:
            raise TrainingError(f"Batch {batch_idx} has no answer token; every row was cut off before its answer.")
        loss = loss_sum / count
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=int(count))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the exact validation loss."""
        self._validation.add(*self._loss(batch))

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` over the whole validation set."""
        loss = self._validation.take()
        if loss is not None:
            self.log("val_loss", loss, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return ``self.optim`` (default ``AdamW()``) built over what trains, scheduled per step."""
        steps = self.trainer.estimated_stepping_batches
        optimizer, schedule = (self.optim or AdamW()).build(self, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Refuse what would train silently wrong; note how the rows are put to the model."""
        refuse_unfit(self.trainer, self._stack, self.shape.max_position_embeddings)
        prompt = prompt_format_of(self.trainer)
        if prompt and self._stack is not None:
            agreed(partial(self._stack.remember_prompt_format, prompt))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Zero gradients, unless the strategy has just made them: Lightning asks for this after the backward pass."""
        if not schedules_steps(self.trainer):
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains in Lightning's checkpoint: the adapters, or all weights in full fine-tuning."""
        checkpoint["state_dict"] = trained_only(checkpoint.get("state_dict", {}), self.named_parameters())

    @property
    def _starts_gradients(self) -> bool:
        """Whether gradients reach a frozen embedding: recomputed layers, and stages without adapters, ask for them."""
        return self.recompute == "full" or parallel.pp_size() > 1

    def _run(self, batch: Batch, chunk: nn.Module) -> tuple[Targets, Tensor]:
        batch = self.local(batch)
        with headless(chunk):
            return Targets(chunk, batch, self.shape.vocab_size), self.run_chunk(chunk, batch)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        output, loss_function = self.forward_step(iter([batch]), self.chunks[0])
        loss_sum, count, _ = loss_function(output)
        return loss_sum, count

    def _do(self, request: Request) -> None:
        match request:
            case Add():
                self.add_adapter(request.transform, request.trainable)
            case Load():
                load(self.stack, request, self.shape, self.base_identity)
            case Freeze():
                self.freeze()
            case Change():
                request.do(self.stack)

    def _change(self, do: Callable[[Stack], None]) -> None:
        """Change the adapters, now or once the model is built."""
        if self.chunks:
            do(self.stack)
        else:
            self._pending.put(Change(do))

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _base_name(self) -> str:
        """Return what the base is called: its known name, or that of its directory."""
        if self.checkpoint and not Path(self.checkpoint).exists():
            return self.checkpoint
        return self.checkpoint_dir.name if self.checkpoint_dir else "random weights"

    def _adds_bos(self) -> bool | None:
        """Tell whether the tokenizer puts BOS in front of a row; None where there is no tokenizer."""
        try:
            return TextEncoder(self.tokenizer, add_eos=False).add_bos
        except (ConfigError, CheckpointError):
            return None

    def _tell_of_window(self) -> None:
        if self.shape.sliding_window == self.shape.max_position_embeddings:
            log.warning(
                "Rows are limited to the model's sliding window of %d tokens, within which it has no effect.",
                self.shape.sliding_window,
            )

    def _check_checkpoint(self) -> None:
        if self.checkpoint_dir is not None:
            check_checkpoint(self.shape, self.checkpoint_dir)

    def _transformer_fields(self) -> dict[str, object]:
        dtype = common_dtype(self.dtype_name, self.checkpoint_dir)
        return {
            **parallel.current_layout().transformer_fields(),
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "perform_initialization": self.checkpoint is None,  # else every value comes from the checkpoint
            **recompute_fields(self.recompute),
        }


def _check_kind(kind: str, shape: Shape) -> None:
    """Raise ConfigError unless models of this kind have such a shape."""
    family = family_named(shape.family)
    if family.kind != kind:
        raise ConfigError(f"a model of kind {kind!r} cannot be a {family.name}, which is of kind {family.kind!r}.")
    if type(shape) is not family.shape_class:
        raise ConfigError(f"a {family.name} has a {family.shape_class.__name__}, not a {type(shape).__name__}.")


def _config_of(chunk: nn.Module) -> TransformerConfig:
    config = chunk.config
    assert isinstance(config, TransformerConfig)
    return config
