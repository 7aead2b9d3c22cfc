"""Lightning strategy over megatron-core: its parallel state, its forward-backward schedule, one update."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from graftwork import parallel
from graftwork.batch import Batch
from graftwork.errors import CheckpointError, ConfigError, ParallelismError
from graftwork.layout import Dimensions, Layout
from graftwork.models.fitting import SchedulesSteps
from graftwork.parallel.collective import agreed, all_gather_objects
from graftwork.training.optimizer.clipping import ModelParallelPrecision
from graftwork.training.optimizer.shards import chunks_of
from graftwork.training.optimizer.update import Update
from graftwork.training.optimizer.zero import can_share
from graftwork.training.run import RunFacts
from graftwork.training.run_directory import discard
from graftwork.training.schedule import StepLoss, run_schedule
from graftwork.training.state import checkpoint as training_state
from graftwork.training.state import random_state
from graftwork.training.state.identity import Identity, KnowsRows, compare, identity_of
from graftwork.training.trainee import data_of, trainee


@runtime_checkable
class DealtRows(Protocol):
    """Data that deal rows to data-parallel ranks in microbatches."""

    global_batch_size: int
    micro_batch_size: int


@runtime_checkable
class PackedRows(Protocol):
    """Data that may pack rows of one length."""

    packing: bool
    seq_length: int


class MegatronStrategy(SchedulesSteps, DDPStrategy):
    """Trains a model that has ``module`` (megatron-core GPTModel, or a list of virtual stages) and ``forward_step``.

    One ``training_step`` runs the batch's microbatches forward and backward through megatron-core's schedule, so
    Lightning's own backward does nothing. Parameters are never broadcast: every rank loads its own slices.

    Args:
        tensor_model_parallel_size: Ranks that share every weight matrix.
        pipeline_model_parallel_size: Ranks that share the layers.
        virtual_pipeline_model_parallel_size: Model chunks per pipeline rank (interleaved schedule); None for one.
        context_parallel_size: Ranks that share every sequence.
        expert_model_parallel_size: Ranks that share the experts.
        sequence_parallel: Also cut activations between the tensor-parallel regions along the sequence.
        distributed_optimizer: Share moments, fp32 masters and summed gradients out over the ranks that hold the same
            weights (ZeRO-1); None: in full fine-tuning only, where there are several such ranks.
    """

    def __init__(
        self,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: Optional[int] = None,
        context_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        sequence_parallel: bool = False,
        distributed_optimizer: Optional[bool] = None,
    ) -> None:
        self._precision = ModelParallelPrecision()
        super().__init__(precision_plugin=self._precision)
        self.layout = Layout(
            tensor_model_parallel_size,
            pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size,
            context_parallel_size,
            expert_model_parallel_size,
            sequence_parallel,
        )
        self.distributed_optimizer = distributed_optimizer
        self.last_step: StepLoss | None = None
        self._facts = RunFacts(seed=1234)
        self._resume_from: str | None = None
        self._allow: Sequence[str] = ()
        self._identity: Identity | None = None
        self._update: Update | None = None
        self._resumed: tuple[Path, training_state.Facts] | None = None
        self._random_state: random_state.State | None = None

    def begin(self, facts: RunFacts, resume_from: str | None, allow_changes: Sequence[str] = ()) -> None:
        """Take what the run decides: its facts, the training state to go on from and what may differ from it."""
        self._facts, self._resume_from, self._allow = facts, resume_from, allow_changes
        self._identity = None

    @property
    def _seed(self) -> int:
        return self._facts.seed or 0

    @property
    def identity(self) -> Identity:
        """What the run is, taken when it is first asked for: before the first step."""
        if self._identity is None:
            self._identity = identity_of(self._lightning, self._lightning.trainer, self.layout, self._facts)
        return self._identity

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations are cut along the sequence between tensor-parallel regions."""
        return self.layout.sequence_parallel

    @property
    def pad_to_multiple(self) -> int:
        """What the data's sequence length must be a multiple of."""
        return self.layout.pad_to_multiple

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of model replicas and this rank's; ranks of one replica read the same rows."""
        return {"num_replicas": parallel.dp_size(), "rank": parallel.dp_rank()}

    @property
    def chunks(self) -> Sequence[nn.Module]:
        """This rank's model chunks: one, or one per virtual pipeline stage."""
        return chunks_of(trainee(self.lightning_module))

    @property
    def update(self) -> Update:
        """The update of what trains; made when the model has been set up."""
        assert self._update is not None, "the model is not set up yet"
        return self._update

    def setup_environment(self) -> None:
        """Check the layout, then make the process groups; called before data and model are set up."""
        self._check()
        if self.num_nodes * self.num_processes == 1:  # a world of one needs no network port
            parallel.ensure_initialized(self._seed)
        super().setup_environment()
        parallel.initialize(self.layout, self._seed)
        self._check_resume()

    def setup(self, trainer: Trainer) -> None:
        """Move the model to its device and make the optimizer; no DDP wrapper, no broadcast over TP shards."""
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self._update = Update(self.chunks)
        if trainer.state.fn == TrainerFn.FITTING:
            assert self.identity is not None, "it is taken here: files may be replaced while the run lasts"
            self.setup_optimizers(trainer)
            self._update.accumulate(self._shares_out(self.optimizers))
            self._update.step_with(self.optimizers)
            self._precision.serve(self._update)
            # The weights exist and agree; from here on dropout may differ between replicas.
            parallel.seed_rng(self._seed, per_data_rank=True)
        self.setup_precision_plugin()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Forward, backward and gradient sums of one optimizer step; returns the mean loss of an answer token."""
        model, update = self._lightning, self.update
        if self._random_state is not None:  # as late as can be: whatever ran before must not have drawn from it
            random_state.restore(self._random_state)
            self._random_state = None
        update.zero()
        with self.precision_plugin.train_step_context():
            self.last_step = run_schedule(trainee(model).forward_step, self.chunks, batch, forward_only=False)
        update.finish(self.last_step.tokens)
        loss = self.last_step.mean
        model.log("train_loss", loss.clone(), prog_bar=True, batch_size=1)
        model.log("grad_norm", update.norm, batch_size=1)
        if len(norms := update.norms()) > 1:
            model.log_dict({f"grad_norm/{name}": norm for name, norm in norms.items()}, batch_size=1)
        model.log_dict(_by_metric(update.learning_rates()), batch_size=1)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log ``val_loss``: the mean over all answer tokens of the validation set, not over batches."""
        return self._evaluation_step("val_loss", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log ``test_loss`` likewise."""
        return self._evaluation_step("test_loss", batch)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: object, **kwargs: object) -> Tensor:
        """Only call the hooks: the schedule has run the backward already."""
        return self.precision_plugin.post_backward(closure_loss, self._lightning)

    # ---- training state: a directory, see training.state.checkpoint ----------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing here: trained weights are saved as shards."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Nothing here: the optimizer's state is saved as shards."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object | None = None
    ) -> None:
        """Write the training state directory, from every rank together."""
        training_state.save(Path(filepath), checkpoint, self.update, self.layout, self.identity)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a training state."""
        if self.is_global_zero:
            discard(Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what is common to all ranks; weights and optimizer follow when Lightning asks for them."""
        path = Path(checkpoint_path)
        checkpoint, state = training_state.read_common(path)
        self._check_identity(path, state)
        self._resumed = path, state
        self._random_state = training_state.read_random_state(path, state, self.layout)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        """Fill the trained parameters; Lightning asks for it before the model is set up."""
        assert self._resumed is not None
        training_state.read_weights(*self._resumed, Update(self.chunks))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        """Fill moments and masters."""
        assert self._resumed is not None
        training_state.read_optimizer(*self._resumed, self.update)

    def teardown(self) -> None:
        """Free the gradient buffers; the process groups stay, so the model works on after the fit."""
        if self._update is not None:
            self._update.release()
        super().teardown()

    def _evaluation_step(self, name: str, batch: Batch) -> Tensor:
        model = self._lightning
        with self.precision_plugin.val_step_context(), torch.no_grad():
            result = run_schedule(trainee(model).forward_step, self.chunks, batch, forward_only=True)
        # Lightning weighs each batch by its batch_size: with tokens as weight the epoch's mean is exact.
        weight = int(result.tokens)
        model.log(name, result.mean, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)
        return result.mean

    def _shares_out(self, optimizers: Sequence[Optimizer]) -> bool:
        """Tell whether data-parallel ranks share the optimizer's state out."""
        if self.distributed_optimizer is not None:
            return self.distributed_optimizer
        return not trainee(self._lightning).adapters and all(map(can_share, optimizers))

    @property
    def _lightning(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _check(self) -> None:
        model = self._lightning
        world = self.num_nodes * self.num_processes
        self.layout.data_parallel_size(world)
        if dist.is_initialized() and dist.get_world_size() != world:
            raise ParallelismError(
                f"this process already belongs to a world of {dist.get_world_size()} rank(s), but the trainer asks for "
                f"{world}: build the model with models.load(..., trainer=trainer)."
            )
        shape: Dimensions | None = getattr(model, "shape", None)
        if shape is not None:
            self.layout.check_shape(shape)
        self._check_trainer(model.trainer, world)

    def _check_resume(self) -> None:
        """Refuse, on every rank, to go on from a state that only some ranks see: the others would start anew."""
        seen = {str(path) for path in all_gather_objects(self._resume_from)}
        if len(seen) > 1:
            raise CheckpointError(
                f"the ranks see different training states to resume from ({', '.join(sorted(seen))}): "
                "the run directory must be on a file system that all nodes share."
            )

    def _check_identity(self, path: Path, state: training_state.Facts) -> None:
        """Refuse the state of another run; tell what differs without harm."""
        verdict = agreed(lambda: compare(state.identity, self.identity, self._allow, str(path)))
        data = data_of(self._lightning.trainer)
        if any(field.startswith("data.") for field in verdict.allowed) and isinstance(data, KnowsRows):
            data.accept_other_rows()
        if verdict.noted and self.is_global_zero:
            print(f"the training state differs: {'; '.join(verdict.noted)}", flush=True)

    def _check_trainer(self, trainer: Trainer, world: int) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must stay 1: "
                "set the data's global_batch_size and micro_batch_size instead."
            )
        if trainer._accelerator_connector._precision_flag != "32-true":
            raise ConfigError("trainer.precision must stay unset: the model's dtype ('fp32', 'bf16') decides.")
        data = data_of(trainer)
        if isinstance(data, DealtRows):
            self.layout.check_batch(data.global_batch_size, data.micro_batch_size, world)
        if isinstance(data, PackedRows) and data.packing:
            self.layout.check_packing(data.seq_length)


def _by_metric(rates: Mapping[str, float]) -> dict[str, float]:
    return {f"lr/{name}": rate for name, rate in rates.items()} if len(rates) > 1 else {"lr": max(rates.values())}
