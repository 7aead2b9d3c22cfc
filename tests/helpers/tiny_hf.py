"""Tiny random Hugging Face checkpoints, saved by transformers: the independent side of every parity test."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ODD_VOCABULARY = 101

_COMMON: dict[str, Any] = {
    "vocab_size": ODD_VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN_MOE = {**_COMMON, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": ODD_VOCABULARY,
    "n_embd": 48,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama"},
    "llama_tied": {**_COMMON, "model_type": "llama", "tie_word_embeddings": True},
    "llama_bias": {**_COMMON, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3_rope": {
        **_COMMON,
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_ROPE,
        "max_position_embeddings": 16384,
    },
    "llama_wide_heads": {**_COMMON, "model_type": "llama", "head_dim": 16},
    "mistral": {**_COMMON, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**_COMMON, "model_type": "qwen2"},
    "qwen3": {**_COMMON, "model_type": "qwen3", "head_dim": 16},
    "gpt2": _GPT2,
    "gpt2_untied": {**_GPT2, "tie_word_embeddings": False, "n_inner": 80},
    "nemotron": {**_COMMON, "model_type": "nemotron"},
    "phi3": {**_COMMON, "model_type": "phi3"},
    "phi3_partial": {
        **_COMMON,
        "model_type": "phi3",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
    "mixtral": {**_COMMON, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral_of_five": {**_COMMON, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 3},
    "qwen3_moe": {**_QWEN_MOE, "model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True},
    "qwen3_moe_unnormed": {**_QWEN_MOE, "model_type": "qwen3_moe", "num_experts_per_tok": 1},
    "qwen2_moe": {**_QWEN_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 40},
    "qwen3_moe_some": {
        **_QWEN_MOE,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "qwen2_moe_every_other": {
        **_QWEN_MOE,
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "qwen2_moe_normed": {
        **_QWEN_MOE,
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 56,
        "qkv_bias": False,
        "norm_topk_prob": True,
    },
}


def tiny_model(family: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Return a random model of ``family``; norms and biases are moved off their initial ones and zeros."""
    torch.manual_seed(seed)
    settings = AutoConfig.for_model(**{**FAMILIES[family], **config})
    model = AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide weights make logits differ between tokens, so that a wrong layout cannot hide.
            noise = 0.1 if parameter.dim() == 1 else 0.08
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def make_tiny(family: str, directory: Path, seed: int = 0, dtype: str = "float32", **config: Any) -> Path:
    """Save a tiny random checkpoint of ``family`` (a key of FAMILIES) to ``directory`` and return it."""
    tiny_model(family, seed, **config).to(getattr(torch, dtype)).save_pretrained(directory)
    return Path(directory)


def oracle(directory: Path) -> PreTrainedModel:
    """Return transformers' own model of a checkpoint directory, in fp32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
