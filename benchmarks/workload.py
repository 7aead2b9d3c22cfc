"""What both sides do: one random Llama checkpoint, and batches of rows as fine-tuning sees them."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from graftwork.batch import IGNORED

RANK = 16
VIRTUAL_TOKENS = 20
PROMPTS = ("ptuning", "prompt")
"""Cases that start from a prompt drawn at random, each side from its own."""
MIX_MEDIAN, MIX_SPREAD = 90, 0.9
"""Row lengths of the mix: log-normal, as instruction data are (a long tail of long rows)."""


@dataclass(frozen=True)
class Size:
    """Sizes of model and batches; ``rows`` x ``length`` is the dense batch, ``mix_rows`` that of the length mix."""

    model: dict[str, int]
    rows: int
    length: int
    mix_rows: int
    mix_length: int
    micro: int


FULL = Size(
    {
        "vocab_size": 16000,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "max_position_embeddings": 1024,
    },
    rows=4,
    length=256,
    mix_rows=32,
    mix_length=512,
    micro=8,
)
SMOLLM2 = Size(
    {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 2048,
    },
    rows=8,
    length=128,
    mix_rows=32,
    mix_length=512,
    micro=8,
)
"""The shape of SmolLM2-135M; a step takes as long with random values as with trained ones."""
QUICK = Size(
    {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
    },
    rows=2,
    length=16,
    mix_rows=8,
    mix_length=64,
    micro=4,
)


@dataclass(frozen=True)
class Batch:
    """Rows of token ids; ``targets[i][t]`` is the token that position t of row i must predict, or IGNORED."""

    tokens: list[Tensor]
    targets: list[Tensor]
    micro: int
    length: int

    @property
    def real_tokens(self) -> int:
        """Tokens without padding: what throughput counts on both sides."""
        return sum(len(row) for row in self.tokens)

    @property
    def target_count(self) -> int:
        """Positions with a loss."""
        return sum(int((row != IGNORED).sum()) for row in self.targets)


def make_checkpoint(size: Size, directory: Path) -> Path:
    """Save a random Llama (tied embeddings) as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**size.model, tie_word_embeddings=True)).save_pretrained(directory)
    return directory


def dense(size: Size) -> Batch:
    """Full rows in which every position but the last has a target: equal arithmetic on both sides."""
    return _batch(size, [size.length] * size.rows, 1.0, size.rows, size.length)


def mix(size: Size) -> Batch:
    """Rows of very different lengths whose last quarter is the answer."""
    draw = numpy.random.default_rng(0).lognormal(math.log(MIX_MEDIAN), MIX_SPREAD, size.mix_rows)
    lengths = draw.round().clip(8, size.mix_length).astype(int).tolist()
    return _batch(size, lengths, 0.25, size.micro, size.mix_length)


def _batch(size: Size, lengths: list[int], answer: float, micro: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, size.model["vocab_size"], (n,), generator=generator) for n in lengths]
    targets = []
    for row in rows:
        target = torch.full_like(row, IGNORED)
        target[:-1] = row[1:]
        target[: int(len(row) * (1 - answer))] = IGNORED
        targets.append(target)
    return Batch(rows, targets, micro, length)


def padded(rows: list[Tensor], fill: int) -> Tensor:
    """Return rows of different lengths as one right-padded matrix."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def microbatches(batch: Batch) -> list[slice]:
    """Row ranges of ``micro`` rows."""
    return [slice(i, i + batch.micro) for i in range(0, len(batch.tokens), batch.micro)]


@dataclass(frozen=True)
class Case:
    """One comparison: what trains, in which precision, on which batch; ``packed`` is our side's layout.

    The peer is a loop over transformers and peft or, with ``trl``, TRL's SFTTrainer with its packing.
    """

    name: str
    title: str
    adapters: str | None = "lora"
    dtype: str = "fp32"
    data: str = "dense"
    packed: bool = False
    trl: bool = False

    def batch(self, size: Size) -> Batch:
        """Return the rows of one step."""
        return dense(size) if self.data == "dense" else mix(size)


CASES = [
    Case("full_fp32", "full fine-tuning, fp32", adapters=None),
    Case("lora_same_fp32", "LoRA on attention output and fc2 only (identical tensors), fp32", adapters="lora_same"),
    Case("lora_fp32", "LoRA on every linear, fp32"),
    Case("lora_bf16", "LoRA on every linear, bf16 base, fp32 adapters", dtype="bf16"),
    Case("ia3_fp32", "IA3, fp32", adapters="ia3"),
    Case("ptuning_fp32", "P-tuning (MLP), 20 virtual tokens, fp32", adapters="ptuning"),
    Case("prompt_fp32", "prompt tuning, 20 virtual tokens, fp32", adapters="prompt"),
    Case("mix_padded", "LoRA fp32, length mix: ours padded, peer padded", data="mix"),
    Case("mix_packed", "LoRA fp32, length mix: ours packed, peer padded", data="mix", packed=True),
    Case("mix_trl", "LoRA fp32, length mix: ours packed, TRL packed", data="mix", packed=True, trl=True),
]


def by_name(name: str) -> Case:
    """Return the case of that name."""
    return next(case for case in CASES if case.name == name)
