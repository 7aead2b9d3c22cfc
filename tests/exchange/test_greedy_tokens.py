"""What transformers and Hugging Face PEFT generate from what we wrote is what we generate, token by token."""

from pathlib import Path

import peft
import pytest
import torch

from graftwork.models import load
from graftwork.models.merging import merge_directory
from graftwork.peft import LoRA
from tests.contracts.methods import shake
from tests.exchange.desk import Desk
from tests.helpers.tiny_hf import oracle as causal
from tests.helpers.tiny_t5 import oracle as seq2seq

NEW, PROMPTS = 12, [[5, 17, 60, 33], [44, 9, 71, 12, 86, 23, 7], [90]]


def generated(model: torch.nn.Module, prompts: list[list[int]], encoder: bool) -> list[list[int]]:
    """Return transformers' greedy continuation of each prompt, alone and without an end token."""
    found = []
    for prompt in prompts:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        if encoder:  # theirs makes a cache of as many layers as the encoder has
            options["use_cache"] = False
        ids = torch.tensor([prompt])
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
        found.append(whole[1:] if encoder else whole[len(prompt) :])
    return found


@pytest.mark.slow
def test_the_pretrained_model_says_the_same_in_peft(tmp_path: Path) -> None:
    model = load("smollm2_135m", dtype="fp32")
    prompts = [model.tokenizer(text).input_ids for text in ("The capital of France is", "Once upon a time, a small")]
    plain = model.generate(prompts, NEW, stop_ids=[])
    model.add_adapter(LoRA(dim=8))
    shake(model, 0.01)
    said = model.generate(prompts, NEW, stop_ids=[])
    model.export_adapters(tmp_path / "peft")
    base = causal(model.checkpoint_dir)
    assert generated(base, prompts, False) == plain != said
    assert generated(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval(), prompts, False) == said


@pytest.mark.parametrize("family", ("llama", "gpt2", "t5v11"))
def test_greedy_tokens_are_the_same_everywhere(family: str, tmp_path: Path) -> None:
    desk = Desk(family, tmp_path / "base")
    plain = desk.ours.generate(PROMPTS, NEW, stop_ids=[])
    ours = desk.grafted(LoRA(dim=4))
    said = ours.generate(PROMPTS, NEW, stop_ids=[])
    assert all(len(one) == NEW for one in said) and said != plain

    ours.export_adapters(tmp_path / "peft")
    ours.save_adapters(tmp_path / "adapter")
    merge_directory(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    merged = (seq2seq if desk.seq2seq else causal)(tmp_path / "merged")
    assert generated(desk.theirs(tmp_path / "peft"), PROMPTS, desk.seq2seq) == said
    assert generated(merged, PROMPTS, desk.seq2seq) == said
    assert generated(desk.base, PROMPTS, desk.seq2seq) == plain
