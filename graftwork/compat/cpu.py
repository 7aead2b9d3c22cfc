"""Makes megatron-core run without CUDA, by changing megatron-core's modules only; with CUDA nothing is changed."""

import contextlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from graftwork.compat import transformer_engine
from graftwork.compat.torch_on_cpu import stand_in

# Inside these modules the name ``torch`` is bound to the stand-in, because they ask for CUDA on paths we run.
REDIRECTED = {
    "megatron.core.models.common.embeddings.rotary_pos_embedding": "moves inv_freq to current_device()",
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding": "moves inv_freq to current_device()",
    "megatron.core.models.gpt.gpt_model": "builds the inference offset on current_device()",
    "megatron.core.transformer.attention": "allocates the key/value cache on current_device()",
    "megatron.core.transformer.dot_product_attention": "allocates softmax offsets on current_device()",
    "megatron.core.transformer.utils": 'builds default causal masks with device="cuda"',
    "megatron.core.transformer.moe.router": "moves expert bias and weights to current_device()",
    "megatron.core.transformer.moe.experts": "allocates grouped weights on current_device()",
    "megatron.core.transformer.moe.moe_utils": "allocates auxiliary-loss buffers on current_device()",
    "megatron.core.transformer.moe.moe_layer": "records events",
    "megatron.core.transformer.moe.shared_experts": "runs on a side stream",
    "megatron.core.transformer.moe.token_dispatcher": "copies to the host on a side stream",
    "megatron.core.utils": "GlobalMemoryBuffer allocates on current_device(); nvtx ranges",
    "megatron.core.tensor_parallel.data": 'broadcasts through device="cuda" buffers',
    "megatron.core.tensor_parallel.layers": "allocates sequence-parallel buffers on current_device()",
    "megatron.core.tensor_parallel.mappings": "allocates gather and reduce-scatter outputs on current_device()",
    "megatron.core.tensor_parallel.random": "seeds the CUDA generator",
    "megatron.core.tensor_parallel.utils": "allocates split and gather buffers on current_device()",
    "megatron.core.pipeline_parallel.p2p_communication": "allocates receive buffers, synchronizes",
    "megatron.core.pipeline_parallel.schedules": 'counts tokens in a device="cuda" tensor',
    "megatron.core.distributed.distributed_data_parallel": "uses streams",
    "megatron.core.distributed.finalize_model_grads": "reduces token counts on current_device()",
    "megatron.core.distributed.param_and_grad_buffer": "allocates flat buffers on current_device()",
    "megatron.core.dist_checkpointing.exchange_utils": "exchanges shards on current_device()",
    "megatron.core.dist_checkpointing.strategies.async_utils": "flags on current_device()",
    "megatron.core.dist_checkpointing.strategies.filesystem_async": "synchronizes",
    "megatron.core.dist_checkpointing.strategies.fully_parallel": "synchronizes",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": "flags on current_device()",
    "megatron.core.dist_checkpointing.strategies.torch": "synchronizes",
    "megatron.core.timers": "synchronizes",
}

F = TypeVar("F", bound=Callable[..., object])

_installed = False


def install() -> bool:
    """Prepare megatron-core for this machine, once; return True when CPU accommodations are in place."""
    global _installed
    transformer_engine.guard()
    if torch.cuda.is_available() or _installed:
        return _installed
    _warn_if_late()
    with _eager_import(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Apex|Transformer Engine).* not installed", UserWarning)
        warnings.filterwarnings("ignore", ".*invalid escape sequence")  # megatron-core 0.19, when first compiled
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
        modules = [importlib.import_module(name) for name in REDIRECTED if _exists(name)]
    for module in modules:
        if getattr(module, "torch", None) is torch:
            _bind(module, torch=stand_in())
    from graftwork.compat import gloo, rng, writer_queue

    rng.install()
    gloo.install()
    writer_queue.install()
    _installed = True
    return True


def _exists(name: str) -> bool:
    """Return whether this megatron-core version has the module ``name``."""
    parent = name.rpartition(".")[0]
    return (parent == "megatron" or _exists(parent)) and importlib.util.find_spec(name) is not None


def _warn_if_late() -> None:
    if "megatron.core" in sys.modules:
        warnings.warn(
            "megatron.core was imported before graftwork: import graftwork.compat first, or megatron-core compiles "
            "functions with a C++ compiler and its backward fails under CPU autocast.",
            stacklevel=3,
        )


@contextlib.contextmanager
def _eager_import() -> Iterator[None]:
    """Import megatron-core with eager functions and autocast bound to CPU, then give torch its own names back.

    megatron-core decorates with ``torch.compile`` (on CPU: a C++ compiler and seconds of warm-up for 2 % of speed) and
    with ``custom_fwd(device_type="cuda")`` (on CPU autocast: bf16 gradients meet fp32 weights in the backward).
    """
    compile_, forward, backward = torch.compile, torch.amp.custom_fwd, torch.amp.custom_bwd

    def eager(function: F | None = None, *_: object, **__: object) -> F | Callable[[F], F]:
        return function if function is not None else lambda f: f

    def on_cpu(wrap: Callable[..., object]) -> Callable[..., object]:
        def bound(function: F | None = None, **kwargs: object) -> object:
            return wrap(function, **(kwargs | {"device_type": "cpu"}))

        return bound

    _bind(torch, compile=eager)
    _bind(torch.amp, custom_fwd=on_cpu(forward), custom_bwd=on_cpu(backward))
    try:
        yield
    finally:
        _bind(torch, compile=compile_)
        _bind(torch.amp, custom_fwd=forward, custom_bwd=backward)


@contextlib.contextmanager
def tensors_stay_on_cpu() -> Iterator[None]:
    """Make ``Tensor.cuda`` return the tensor itself while a model is built without CUDA.

    megatron-core calls ``weight.data.cuda()`` on tied embeddings that live on two pipeline stages.
    """
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.cuda
    _bind(torch.Tensor, cuda=lambda self, *_, **__: self)
    try:
        yield
    finally:
        _bind(torch.Tensor, cuda=original)


def _bind(owner: object, **names: object) -> None:
    """Replace names of a module or class for a while; as assignments the type checker rightly minds them."""
    for name, value in names.items():
        setattr(owner, name, value)
