"""The peer's side: transformers' Llama, Hugging Face peft's LoRA, torch's AdamW, the loop of their documentation."""

from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM
from workload import IGNORED, PROMPTS, RANK, VIRTUAL_TOKENS, Batch, Case, microbatches, padded

TARGETS = {
    "lora": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_same": ["o_proj", "down_proj"],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Peer:
    """One case: a model, its optimizer, its batch laid out once."""

    def __init__(self, checkpoint: Path, case: Case, batch: Batch) -> None:
        self.model: Any = load(checkpoint, case.dtype)
        if case.adapters is not None:
            self.model = get_peft_model(self.model, configuration(case.adapters))
        self.model.train()
        self.count = torch.tensor(batch.target_count)
        self.batches = [_inputs(batch, rows, case.data == "mix") for rows in microbatches(batch)]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4 if case.adapters else 2e-5, weight_decay=0.0)

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def step(self) -> float:
        """Forward, backward and update over all microbatches; returns the loss before the update."""
        total = 0.0
        for inputs in self.batches:
            loss = self.model(**inputs, use_cache=False, num_items_in_batch=self.count).loss
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def save(self, path: Path) -> None:
        """Write the adapters."""
        self.model.save_pretrained(path)

    def restore(self, path: Path) -> None:
        """Read the adapters into the bare base (after taking the old ones off)."""
        self.model = PeftModel.from_pretrained(self.model.unload(), path, is_trainable=True)


def configuration(adapters: str) -> Any:
    """Return peft's configuration of a case."""
    if adapters == "ia3":
        scaled = ["k_proj", "v_proj", "down_proj"]
        return IA3Config(target_modules=scaled, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    if adapters in PROMPTS:
        made = PromptEncoderConfig if adapters == "ptuning" else PromptTuningConfig
        return made(num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM")
    return LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS[adapters], task_type="CAUSAL_LM")


def load(checkpoint: Path, dtype: str = "fp32") -> Any:
    """Build the model and read its weights."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPES[dtype])


def _inputs(batch: Batch, rows: slice, masked: bool) -> dict[str, Any]:
    """transformers shifts the labels itself and masks padding by ``attention_mask``, as its collators give it."""
    tokens = padded(batch.tokens[rows], 0)
    targets = padded(batch.targets[rows], IGNORED)
    labels = torch.full_like(targets, IGNORED)
    labels[:, 1:] = targets[:, :-1]
    mask = padded([torch.ones_like(row) for row in batch.tokens[rows]], 0)
    return {"input_ids": tokens, "labels": labels, **({"attention_mask": mask} if masked else {})}
