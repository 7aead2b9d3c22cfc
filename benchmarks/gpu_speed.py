"""Tokens a second, MFU and peak memory of LoRA steps on random weights of published sizes, beside the peer's."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

RANK, WARM, TIMED = 16, 2, 4
FLOPS_A_TOKEN = 4
"""Operations of a PEFT step per token and parameter: forward 2, backward 2, for weights get no gradient."""
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 operations a second by a part of the card's name (NVIDIA's data sheets, SXM)."""
SIZES: dict[str, dict[str, Any]] = {
    "llama3_8b": {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rotary_base": 500000.0,
    },
    "qwen2_5_7b": {
        "num_layers": 28,
        "hidden_size": 3584,
        "ffn_hidden_size": 18944,
        "num_attention_heads": 28,
        "num_query_groups": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rotary_base": 1000000.0,
        "add_qkv_bias": True,
        "family": "qwen2",
    },
}
TOY: dict[str, dict[str, Any]] = {
    "toy": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 211,
        "max_position_embeddings": 64,
    }
}
ANCHORS = {"llama3_8b": 12473, "qwen2_5_7b": 14110}
"""Published tokens a second on one H100: NeMo Automodel's performance summary, LoRA of rank 16, sequence 4096, bf16."""


@dataclass(frozen=True)
class Cell:
    """One measured configuration. ``side``: ours or peer; ``layers``: eager or compiled, of ours."""

    model: str
    side: str
    micro_batch: int = 1
    recompute: str | None = None
    layers: str = "eager"


def cells(sizes: dict[str, dict[str, Any]]) -> list[Cell]:
    """Return what is measured, what matters most first: a deadline may cut the list."""
    found = [Cell(model, side) for model in sizes for side in ("ours", "peer")]
    if torch.cuda.is_available():  # elsewhere torch compiles with a C++ compiler, which may not be there
        found += [Cell(model, "ours", layers="compiled") for model in sizes]
    found += [Cell(model, "ours", micro, recompute) for model in sizes for micro, recompute in
              ((2, None), (1, "selective"), (1, "full"), (4, "full"))]  # fmt: skip
    found += [Cell(model, "peer", 4, "full") for model in sizes]
    return found


def measure(sizes: dict[str, dict[str, Any]], length: int, deadline: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each cell; one that runs out of memory, fails or no longer fits in time says so."""
    longest = 0.0
    for cell in cells(sizes):
        started = time.monotonic()
        row: dict[str, Any] = {**asdict(cell), "length": length}
        if started + 1.3 * longest > deadline:
            yield row | {"left_out": "no time was left"}
            continue
        try:
            row |= _figures(cell, sizes[cell.model], length)
        except torch.OutOfMemoryError:
            row |= {"left_out": "out of memory"}
        except (RuntimeError, AssertionError, ValueError, ImportError) as error:  # dynamo's are RuntimeErrors
            row |= {"left_out": f"{type(error).__name__}: {str(error)[:200]}"}
        _free()
        longest = max(longest, time.monotonic() - started)
        yield row


def _figures(cell: Cell, size: dict[str, Any], length: int) -> dict[str, Any]:
    step, parameters = (_ours if cell.side == "ours" else _peer)(cell, size, length)
    for _ in range(WARM):
        loss = step()
    _synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(TIMED):
        loss = step()
    _synchronize()
    speed = TIMED * cell.micro_batch * length / (time.perf_counter() - started)
    peak = _peak_flops()
    return {
        "tokens_per_second": speed,
        "mfu": None if peak is None else FLOPS_A_TOKEN * parameters * speed / peak,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        "parameters": parameters,
        "loss": float(loss),
    }


def _ours(cell: Cell, size: dict[str, Any], length: int) -> tuple[Callable[[], Tensor], int]:
    from graftwork.batch import Batch
    from graftwork.models import GPT
    from graftwork.models.shapes import Shape
    from graftwork.optim import AdamW
    from graftwork.peft import LoRA

    shape = Shape(**size)
    model = GPT(shape, dtype="bf16", recompute=cell.recompute)
    model.configure_model()
    model.add_adapter(LoRA(dim=RANK))
    model.train()
    if cell.layers == "compiled":
        layers = model.chunks[0].decoder.layers
        for number, layer in enumerate(layers):
            layers[number] = torch.compile(layer)
    device = next(model.chunks[0].parameters()).device
    ids = _ids(shape.vocab_size, cell.micro_batch, length)
    # Four samples a row, as packing makes them: each attends to itself alone.
    quarter = length // 4
    positions = torch.arange(quarter).repeat(4).expand(cell.micro_batch, -1)
    bounds = (torch.arange(5, dtype=torch.int32) * quarter).expand(cell.micro_batch, -1)
    batch = Batch(ids, ids.roll(-1, 1), positions, bounds.contiguous()).to(device)
    optimizer, _ = AdamW(lr=1e-4, schedule="constant").build(model, WARM + TIMED)

    def step() -> Tensor:
        output, loss_of = model.forward_step(iter([batch]), model.chunks[0])
        total, count, _ = loss_of(output)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.detach() / count

    return step, shape.total_parameters()


def _peer(cell: Cell, size: dict[str, Any], length: int) -> tuple[Callable[[], Tensor], int]:
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2" if size.get("family") == "qwen2" else "llama",
        num_hidden_layers=size["num_layers"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["ffn_hidden_size"],
        num_attention_heads=size["num_attention_heads"],
        num_key_value_heads=size["num_query_groups"],
        vocab_size=size["vocab_size"],
        max_position_embeddings=size["max_position_embeddings"],
        tie_word_embeddings=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    parameters = sum(p.numel() for p in base.parameters())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if cell.recompute is not None:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM")).train()
    ids = _ids(size["vocab_size"], cell.micro_batch, length).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, parameters


def _ids(vocabulary: int, rows: int, length: int) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def _peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAK.items() if part in name), None)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
