"""The tokenizer inside a GGUF file -> tokenizer.json and tokenizer_config.json (byte-level BPE)."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.errors import CheckpointError, suggest

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

Metadata = dict[str, Any]
"""The file's ``tokenizer.*`` entries: strings, numbers, and lists as long as the vocabulary."""

_LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
_LLAMA3_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTROL = 3
"""GGUF token type of special tokens."""


def write_tokenizer(fields: Metadata, directory: Path) -> None:
    """Write the tokenizer that the ``tokenizer.*`` metadata describe; raises CheckpointError for an unknown kind."""
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"GGUF tokenizer {kind!r} is not supported; valid: 'gpt2' (byte-level BPE).")
    _tokenizer(fields).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(_settings(fields), indent=2) + "\n")


def _tokenizer(fields: Metadata) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    kind = fields.get("tokenizer.ggml.pre", "default")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = _splitter(kind)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types) if type_ == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _splitter(kind: str) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    llama3 = pre_tokenizers.Split(Regex(_LLAMA3_WORDS + _LLAMA3_REST), behavior="isolated")
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    kinds = {
        "default": plain,
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([digits, plain]),
        "llama-bpe": pre_tokenizers.Sequence([llama3, cut]),
    }
    if kind not in kinds:
        raise CheckpointError(f"GGUF pre-tokenizer {kind!r} is not supported; {suggest(kind, kinds)}")
    return kinds[kind]


def _settings(fields: Metadata) -> dict[str, object]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    ids = {setting: fields.get(f"tokenizer.ggml.{name}_token_id") for name, setting in names.items()}
    settings: dict[str, object] = {name: tokens[i] for name, i in ids.items() if i is not None}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    template = fields.get("tokenizer.chat_template")
    return {**settings, "chat_template": template} if template else settings
