"""Lightning strategy over megatron-core: its parallel state, its forward-backward schedule, our gradient sums."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from graftwork import parallel
from graftwork.errors import CheckpointError, ConfigError, ParallelismError
from graftwork.layout import Layout
from graftwork.parallel.collective import all_gather_objects
from graftwork.training.optimizer.clipping import ModelParallelPrecision
from graftwork.training.optimizer.gradients import Gradients
from graftwork.training.optimizer.shards import chunks_of
from graftwork.training.run_directory import discard
from graftwork.training.schedule import StepLoss, run_schedule
from graftwork.training.state import checkpoint as training_state
from graftwork.training.state import random_state


class MegatronStrategy(DDPStrategy):
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
    """

    drives_backward = True

    def __init__(
        self,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: Optional[int] = None,
        context_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(precision_plugin=ModelParallelPrecision())
        self.layout = Layout(
            tensor_model_parallel_size,
            pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size,
            context_parallel_size,
            expert_model_parallel_size,
            sequence_parallel,
        )
        self.seed = 1234
        self.resume_from: str | None = None
        self.gradients: Gradients | None = None
        self.last_step: StepLoss | None = None
        self._resumed: tuple[Path, dict[str, Any]] | None = None
        self._random_state: random_state.State | None = None

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
        return chunks_of(self._module)

    def setup_environment(self) -> None:
        """Check the layout, then make the process groups; called before data and model are set up."""
        self._check()
        if self.num_nodes * self.num_processes == 1:  # a world of one needs no network port
            parallel.ensure_initialized(self.seed)
        super().setup_environment()
        parallel.initialize(self.layout, self.seed)
        self._check_resume()

    def setup(self, trainer: Trainer) -> None:
        """Move the model to its device and make the optimizer; no DDP wrapper, no broadcast over TP shards."""
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self._setup_gradients()
            self.setup_optimizers(trainer)
            _optimizers_to_device(self.optimizers, self.root_device)
            # The weights exist and agree; from here on dropout may differ between replicas.
            parallel.seed_rng(self.seed, per_data_rank=True)
        self.setup_precision_plugin()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]
        """Forward, backward and gradient sums of one optimizer step; returns the mean loss of an answer token."""
        module, gradients = self._module, self.gradients
        assert gradients is not None
        if self._random_state is not None:  # as late as can be: whatever ran before must not have drawn from it
            random_state.restore(self._random_state)
            self._random_state = None
        gradients.zero()
        with self.precision_plugin.train_step_context():
            self.last_step = run_schedule(module.forward_step, self.chunks, batch, forward_only=False)
        gradients.finish(self.last_step.tokens)
        loss = self.last_step.mean
        module.log("train_loss", loss.clone(), prog_bar=True, batch_size=1)
        module.log("grad_norm", gradients.norm.clone(), batch_size=1)
        module.log_dict(self._learning_rates(), batch_size=1)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]
        """Log ``val_loss``: the mean over all answer tokens of the validation set, not over batches."""
        return self._evaluation_step("val_loss", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]
        """Log ``test_loss`` likewise."""
        return self._evaluation_step("test_loss", batch)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Only call the hooks: the schedule has run the backward already."""
        return self.precision_plugin.post_backward(closure_loss, self._module)

    # ---- training state: a directory, see training.state.checkpoint ----------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing here: trained weights are saved as shards."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing here: the optimizer's state is saved as shards."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the training state directory, from every rank together."""
        optimizers = [getattr(o, "optimizer", o) for o in self.optimizers]
        training_state.save(Path(filepath), checkpoint, self._module, optimizers, self.layout)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a training state."""
        if self.is_global_zero:
            discard(Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what is common to all ranks; weights and optimizer follow when Lightning asks for them."""
        path = Path(checkpoint_path)
        checkpoint, state = training_state.read_common(path)
        self._resumed = path, state
        self._random_state = training_state.read_random_state(path, state, self.layout)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Fill the trained parameters."""
        assert self._resumed is not None
        training_state.read_weights(*self._resumed, self._module)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Fill moments and masters."""
        assert self._resumed is not None
        for optimizer in self.optimizers:
            training_state.read_optimizer(*self._resumed, self._module, optimizer)

    def teardown(self) -> None:
        """Free the gradient buffers; the process groups stay, so the model works on after the fit."""
        if self.gradients is not None:
            self.gradients.release()
            self.gradients = None
        super().teardown()

    def _evaluation_step(self, name: str, batch: dict[str, Any]) -> Tensor:
        with self.precision_plugin.val_step_context(), torch.no_grad():
            result = run_schedule(self._module.forward_step, self.chunks, batch, forward_only=True)
        # Lightning weighs each batch by its batch_size: with tokens as weight the epoch's mean is exact.
        weight = int(result.tokens)
        self._module.log(name, result.mean, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)
        return result.mean

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def _learning_rates(self) -> dict[str, float]:
        rates = {group["name"]: float(group["lr"]) for o in self.optimizers for group in o.param_groups}
        # The largest of a group's rates stands for it (LoRA+ has a second one).
        return {f"lr/{name}": rate for name, rate in rates.items()} if len(rates) > 1 else {"lr": max(rates.values())}

    def _setup_gradients(self) -> None:
        self.gradients = Gradients(self.chunks)
        count = torch.tensor(len(self.gradients.parameters), device=self.root_device)
        dist.all_reduce(count)
        if not int(count):
            raise ConfigError(
                "nothing to train: every parameter is frozen; give a peft stack, or none of it for full fine-tuning."
            )
        plugin = self.precision_plugin
        assert isinstance(plugin, ModelParallelPrecision)
        plugin.gradients = self.gradients

    def _check(self) -> None:
        module = self._module
        world = self.num_nodes * self.num_processes
        self.layout.data_parallel_size(world)
        if dist.is_initialized() and dist.get_world_size() != world:
            raise ParallelismError(
                f"this process already belongs to a world of {dist.get_world_size()} rank(s), but the trainer asks for "
                f"{world}: build the model with models.load(..., trainer=trainer)."
            )
        if getattr(module, "shape", None) is not None:
            self.layout.check_shape(module.shape)
        self._check_trainer(module, world)

    def _check_resume(self) -> None:
        """Refuse, on every rank, to go on from a state that only some ranks see: the others would start anew."""
        seen = {str(path) for path in all_gather_objects(self.resume_from)}
        if len(seen) > 1:
            raise CheckpointError(
                f"the ranks see different training states to resume from ({', '.join(sorted(seen))}): "
                "the run directory must be on a file system that all nodes share."
            )

    def _check_trainer(self, module: LightningModule, world: int) -> None:
        trainer, data = module.trainer, getattr(module.trainer, "datamodule", None)
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must stay 1: "
                "set the data's global_batch_size and micro_batch_size instead."
            )
        if trainer._accelerator_connector._precision_flag != "32-true":
            raise ConfigError("trainer.precision must stay unset: the model's dtype ('fp32', 'bf16') decides.")
        if data is not None and hasattr(data, "global_batch_size") and hasattr(data, "micro_batch_size"):
            self.layout.check_batch(data.global_batch_size, data.micro_batch_size, world)
        if data is not None and getattr(data, "packing", False):
            self.layout.check_packing(data.seq_length)
