"""The parallel state: megatron-core's process groups, made, named and destroyed in one place.

Axes: tensor, pipeline (with virtual stages), context, expert, and data for what is left of the world size.
"""

import importlib
import importlib.util

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import random as megatron_random
from torch.distributed import ProcessGroup

from graftwork.layout import Layout

_layout = Layout()


def initialize(layout: Layout = _layout, seed: int = 1234) -> None:
    """Make the process groups of ``layout`` and seed the random states; collective over ``torch.distributed``.

    Without ``torch.distributed`` this process becomes a world of its own. Groups of the same sizes are kept. Raises
    ParallelismError when the ranks cannot be laid out so.
    """
    global _layout
    layout.data_parallel_size(dist.get_world_size() if dist.is_initialized() else 1)
    if not dist.is_initialized():
        _make_world_of_one()
    if not is_initialized() or layout.groups_only != _layout.groups_only:
        mpu.destroy_model_parallel()
        mpu.initialize_model_parallel(
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
            context_parallel_size=layout.context_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
    _layout = layout
    seed_rng(seed)


def current_layout() -> Layout:
    """Return the layout of the groups that there are; a plain one without any."""
    return _layout if is_initialized() else Layout()


def ensure_initialized(seed: int = 1234) -> None:
    """Make a one-process parallel state when there is none; leave an existing one alone."""
    if not is_initialized():
        initialize(seed=seed)


def is_initialized() -> bool:
    """Return whether the parallel state exists and its groups belong to the process group that is there now."""
    return bool(dist.is_initialized() and mpu.model_parallel_is_initialized() and _registered(tp_group()))


def _registered(group: ProcessGroup) -> bool:
    """Tell a live group from one whose ``torch.distributed`` somebody has destroyed and perhaps made anew."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


def destroy() -> None:
    """Forget the parallel state, its groups, buffers and random states; the next initialize starts afresh."""
    global _layout
    _layout = Layout()
    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    megatron_random.initialize_rng_tracker(force_reset=True)
    importlib.import_module("megatron.core.num_microbatches_calculator").unset_num_microbatches_calculator()
    _forget_auxiliary_losses()


def _forget_auxiliary_losses() -> None:
    """Drop the experts' auxiliary-loss buffers (as long as the last model had layers) and the last loss scale."""
    moe = "megatron.core.transformer.moe"
    importlib.import_module(f"{moe}.moe_utils").MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if importlib.util.find_spec(f"{moe}.moe_logging"):  # from megatron-core 0.17 on
        importlib.import_module(f"{moe}.moe_logging").destroy_moe_metrics_tracker()
    else:
        importlib.import_module(f"{moe}.moe_utils").get_moe_layer_wise_logging_tracker().clear()


def seed_rng(seed: int, per_data_rank: bool = False) -> None:
    """Seed the default generator and the tensor- and expert-parallel states from ``seed``.

    Pipeline stages differ. Data-parallel ranks agree unless ``per_data_rank`` (dropout then differs between replicas;
    set it only after the weights exist, because weights drawn from the default generator must agree).
    """
    offset = 100 * pp_rank() + (10_000 * dp_rank(with_context_parallel=True) if per_data_rank else 0)
    torch.manual_seed(seed + offset)
    megatron_random.model_parallel_cuda_manual_seed(seed + offset)


def _make_world_of_one() -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def tp_rank() -> int:
    """Rank along the tensor axis."""
    return int(mpu.get_tensor_model_parallel_rank())


def tp_size() -> int:
    """Number of ranks along the tensor axis."""
    return int(mpu.get_tensor_model_parallel_world_size())


def tp_group() -> ProcessGroup:
    """Ranks that hold the other cuts of this rank's tensors."""
    return _group(mpu.get_tensor_model_parallel_group())


def pp_rank() -> int:
    """Rank along the pipeline axis."""
    return int(mpu.get_pipeline_model_parallel_rank())


def pp_size() -> int:
    """Number of ranks along the pipeline axis."""
    return int(mpu.get_pipeline_model_parallel_world_size())


def pp_group() -> ProcessGroup:
    """Ranks that hold the other stages of this rank's pipeline."""
    return _group(mpu.get_pipeline_model_parallel_group())


def vp_size() -> int | None:
    """Number of virtual stages on each pipeline rank, None without virtual stages."""
    return _layout.virtual_pipeline_model_parallel_size


def cp_rank() -> int:
    """Rank along the context axis."""
    return int(mpu.get_context_parallel_rank())


def cp_size() -> int:
    """Number of ranks along the context axis."""
    return int(mpu.get_context_parallel_world_size())


def cp_group() -> ProcessGroup:
    """Ranks that hold the other parts of this rank's sequences."""
    return _group(mpu.get_context_parallel_group())


def dp_rank(with_context_parallel: bool = False) -> int:
    """Rank along the data axis (data x context with the flag)."""
    return int(mpu.get_data_parallel_rank(with_context_parallel=with_context_parallel))


def dp_size(with_context_parallel: bool = False) -> int:
    """Number of ranks along the data axis (data x context with the flag)."""
    return int(mpu.get_data_parallel_world_size(with_context_parallel=with_context_parallel))


def dp_group(with_context_parallel: bool = False) -> ProcessGroup:
    """Ranks that hold the same non-expert parameters and other rows (or other parts of rows, with the flag)."""
    return _group(mpu.get_data_parallel_group(with_context_parallel=with_context_parallel))


def ep_rank() -> int:
    """Rank along the expert axis."""
    return int(mpu.get_expert_model_parallel_rank())


def ep_size() -> int:
    """Number of ranks along the expert axis."""
    return int(mpu.get_expert_model_parallel_world_size())


def ep_group() -> ProcessGroup:
    """Ranks that hold the other experts of this rank's layers."""
    return _group(mpu.get_expert_model_parallel_group())


def expert_dp_group() -> ProcessGroup:
    """Ranks that hold the same experts."""
    return _group(mpu.get_expert_data_parallel_group())


def embedding_group() -> ProcessGroup:
    """The first and last pipeline stage, which both hold tied embeddings."""
    return _group(mpu.get_embedding_group())


def model_parallel_group(expert: bool = False) -> ProcessGroup:
    """Ranks that together hold one model (tensor x pipeline); with ``expert`` one set of experts."""
    return _group(mpu.get_expert_tensor_model_pipeline_parallel_group() if expert else mpu.get_model_parallel_group())


def is_first_stage(vp: int | None = None) -> bool:
    """Return whether this pipeline rank's chunk ``vp`` holds the embedding."""
    return pp_rank() == 0 and vp in (None, 0)


def is_last_stage(vp: int | None = None) -> bool:
    """Return whether this pipeline rank's chunk ``vp`` holds the output layer."""
    size = vp_size()
    return pp_rank() == pp_size() - 1 and (vp is None or size is None or vp == size - 1)


def _group(found: object) -> ProcessGroup:
    """Give megatron-core's un-annotated group its type."""
    assert isinstance(found, ProcessGroup)
    return found
