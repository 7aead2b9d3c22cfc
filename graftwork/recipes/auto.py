"""Any base without a recipe of its own: what it says of itself and the devices at hand make one."""

from dataclasses import dataclass, replace
from typing import Optional

import fiddle as fdl
import nemo_run as run
import torch

from graftwork.data.chat import row_templates
from graftwork.errors import ConfigError
from graftwork.layout import Layout
from graftwork.models import MODELS
from graftwork.models.described import Description, describe
from graftwork.models.fitting import refuse_length
from graftwork.models.precision import resolve_dtype
from graftwork.models.shapes.published import said
from graftwork.peft import PEFT
from graftwork.planning.blueprint import Blueprint
from graftwork.planning.checks import Intent
from graftwork.planning.choice import choose
from graftwork.planning.devices import CPU, DEVICES, Device, device_named, this_gpu
from graftwork.planning.workload import Workload
from graftwork.recipes import parts

LENGTH, SHORT, PAIR = 4096, 1024, 512
"""Longest row: of a causal model, packed on GPUs and padded on a CPU, and the prompt of an encoder-decoder."""
ROWS, PAIRS, MOST = 8, 64, 16
"""Rows of a step, those of an encoder-decoder on GPUs, and the largest microbatch of them."""
EVEN = 64
"""Rows are a multiple of it where nobody says how long they are, so that ranks can share them."""


@dataclass(frozen=True)
class Devices:
    """What the ranks will be: ``nodes`` of ``of_a_node`` each, and what one of them can do."""

    nodes: int
    of_a_node: int
    kind: Device
    accelerator: str = "auto"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.of_a_node

    @property
    def cpu(self) -> bool:
        """Whether they have no GPU."""
        return self.kind.name == CPU


def finetune_recipe(
    base: Optional[str] = None,
    dir: str = "runs",
    name: str = "default",
    num_nodes: int = 1,
    num_gpus_per_node: Optional[int] = None,
    peft: Optional[list[PEFT]] = parts.LORA,
    seq_length: Optional[int] = None,
    device: Optional[str] = None,
) -> run.Partial:
    """A base that nobody has written a recipe for trains with one that is made from its own files.

    ``base``: a checkpoint directory, GGUF file, hub id or registered name; ``num_gpus_per_node`` None: the GPUs of this
    machine, or one process on its CPU; ``seq_length`` None: 4096 packed tokens, 1024 on a CPU, 512 for an
    encoder-decoder, or all that the model takes; ``device``: what to lay the model out for (H100, H200, A100, B200,
    cpu), None: what this machine has, GPUs of 80 GB where it has none. Raises CheckpointError for a base that is none,
    ConfigError where nothing fits.
    """
    if not base:
        raise ConfigError("auto needs a base, auto(base=PLACE): a checkpoint directory, a GGUF file or a hub id.")
    found, devices = describe(str(base)), _devices(num_nodes, num_gpus_per_node, device)
    stack = parts.stack(parts.ATTENTION_LORA if peft is parts.LORA and found.shape.mixtures else peft)
    for dtype in _dtypes(found, devices.cpu):
        wanted = _intent(found, devices, stack or [], seq_length, dtype)
        if chosen := choose(wanted, devices.of_a_node, devices.kind):
            model = _model(str(base), found, dtype, chosen.blueprint.recompute)
            trainer = _trainer(dir, name, devices, chosen.layout)
            return parts.finetune_task(model, trainer, _data(found, chosen.workload), stack, 10 if devices.cpu else 50)
    raise ConfigError(_nothing_fits(str(base), found, devices))


def _devices(nodes: int, of_a_node: Optional[int], device: Optional[str]) -> Devices:
    for field, value in (("num_nodes", nodes), ("num_gpus_per_node", of_a_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{field}={value} is no number of devices; 1 and more are valid.")
    if nodes > 1 and of_a_node is None:
        raise ConfigError(f"num_nodes={nodes} needs num_gpus_per_node: this machine cannot count the GPUs of others.")
    present = torch.cuda.device_count()
    if (device or "").lower() == CPU or not (device or of_a_node or present):
        kind, ranks = device_named(CPU), of_a_node or 1
        kind = replace(kind, memory=kind.memory / ranks)
        return Devices(nodes, ranks, kind, "auto" if device is None else CPU)
    kind = device_named(device) if device else this_gpu() if present else DEVICES["A100"]
    return Devices(nodes, of_a_node or present or 1, kind)


def _intent(
    found: Description, devices: Devices, stack: list[run.Config], seq_length: Optional[int], dtype: str
) -> Intent:
    kind, context = MODELS[found.kind], found.shape.max_position_embeddings
    length = seq_length or _length(kind.seq2seq, devices.cpu, context)
    refuse_length(length, context)
    rows = PAIRS if kind.seq2seq and not devices.cpu else ROWS
    work = Workload(
        seq_length=length,
        micro_batch_size=min(rows, MOST) if kind.seq2seq or devices.cpu else 1,
        global_batch_size=-(-rows // devices.world) * devices.world,
        packing=not (kind.seq2seq or devices.cpu),
        answer_length=length if kind.seq2seq else None,
    )
    precision = "bf16" if resolve_dtype(dtype, None) == torch.bfloat16 else "fp32"
    blueprint = Blueprint(kind, found.shape, precision, None, tuple(fdl.build(one) for one in stack))
    return Intent(blueprint, Layout(), devices.world, work)


def _length(seq2seq: bool, cpu: bool, context: int) -> int:
    length = min(PAIR if seq2seq else SHORT if cpu else LENGTH, context)
    return length - length % EVEN if length > EVEN else length


def _dtypes(found: Description, cpu: bool) -> tuple[str, ...]:
    """Return what the base may be held in: bf16 on GPUs; on a CPU its own fp32 or what is fast, else what is small."""
    if not cpu:
        return ("bf16",)
    return ("fp32" if found.dtype == "float32" else "auto", "bf16")


def _model(base: str, found: Description, dtype: str, recompute: Optional[str]) -> run.Config:
    shape = run.Config(type(found.shape), **said(found.shape))
    return run.Config(MODELS[found.kind], shape=shape, checkpoint=base, dtype=dtype, recompute=recompute)


def _trainer(dir: str, name: str, devices: Devices, layout: Layout) -> run.Config:
    made = parts.megatron_trainer(
        dir,
        name,
        devices.nodes,
        devices.of_a_node,
        max_steps=200 if devices.cpu else 1000,
        tensor=layout.tensor_model_parallel_size,
        pipeline=layout.pipeline_model_parallel_size,
        expert=layout.expert_model_parallel_size,
        context=layout.context_parallel_size,
    )
    made.accelerator = devices.accelerator
    return made


def _data(found: Description, work: Workload) -> run.Config:
    data = parts.sft(work.seq_length, work.global_batch_size, work.micro_batch_size, work.packing)
    templates = None if found.tokenizer is None else row_templates(found.tokenizer)
    if templates is not None:
        data.prompt_template, data.answer_template = templates
    return data


def _nothing_fits(base: str, found: Description, devices: Devices) -> str:
    size = f"{found.shape.total_parameters() / 1e9:.3g}B parameters"
    where = f"{devices.world} x {devices.kind.name} of {devices.kind.memory / 1e9:.3g} GB"
    mend = "take more devices (num_nodes, num_gpus_per_node), larger ones (device) or shorter rows (seq_length)"
    if devices.cpu:
        mend = "name the GPUs that it will train on (num_gpus_per_node), or take shorter rows (seq_length)"
    return f"{base} ({size}) does not fit {where}: {mend}."
