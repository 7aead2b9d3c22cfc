"""The tokenizer inside a GGUF file -> tokenizer.json and tokenizer_config.json (byte-level BPE)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from pydantic import BaseModel, ConfigDict, Field

from graftwork.errors import CheckpointError, quoted, suggest
from graftwork.jsonfile import validated

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
_LLAMA3_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTROL = 3
"""GGUF token type of special tokens."""


class Vocabulary(BaseModel):
    """The file's ``tokenizer.*`` metadata, as far as they are read."""

    model_config = ConfigDict(strict=True)
    pre: str = Field("default", alias="tokenizer.ggml.pre")
    tokens: list[str] = Field(alias="tokenizer.ggml.tokens", min_length=1)
    types: list[int] = Field(alias="tokenizer.ggml.token_type")
    merges: list[str] = Field(alias="tokenizer.ggml.merges")
    bos: Optional[int] = Field(None, alias="tokenizer.ggml.bos_token_id")
    eos: Optional[int] = Field(None, alias="tokenizer.ggml.eos_token_id")
    pad: Optional[int] = Field(None, alias="tokenizer.ggml.padding_token_id")
    unk: Optional[int] = Field(None, alias="tokenizer.ggml.unknown_token_id")
    chat_template: Optional[str] = Field(None, alias="tokenizer.chat_template")

    def ids(self, *names: str) -> dict[str, int]:
        """Return the ids of the special tokens ``names`` that the file gives."""
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


def read_vocabulary(fields: Mapping[str, object]) -> Vocabulary:
    """Return what the ``tokenizer.*`` metadata describe; raises CheckpointError for an unknown or a damaged one."""
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"GGUF tokenizer {quoted(kind)} is not supported; valid: 'gpt2' (byte-level BPE).")
    found = validated(dict(fields), Vocabulary, "the tokenizer of the GGUF file", CheckpointError)
    problem = _problem(found)
    if problem:
        raise CheckpointError(f"the tokenizer of the GGUF file is damaged: {problem}.")
    _splitter(found.pre)
    return found


def _problem(found: Vocabulary) -> str | None:
    """Say what the tokenizers library would not take, or take as something else."""
    tokens = set(found.tokens)
    if "" in tokens or len(tokens) < len(found.tokens):
        return "a token is empty or stands there twice"
    if len(found.types) != len(found.tokens):
        return f"it has {len(found.tokens):,} tokens and {len(found.types):,} types"
    for merge in found.merges:
        parts = merge.split(" ")
        if len(parts) != 2 or not tokens.issuperset([*parts, "".join(parts)]):
            return f"the merge {quoted(merge)} is not of two tokens into a third"
    for name, value in found.ids("bos", "eos", "pad", "unk").items():
        if not 0 <= value < len(found.tokens):
            return f"the {name} token is {value}, its tokens are 0 to {len(found.tokens) - 1}"
    return None


def write_tokenizer(vocabulary: Vocabulary, directory: Path) -> None:
    """Write the tokenizer into ``directory``."""
    _tokenizer(vocabulary).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(_settings(vocabulary), indent=2) + "\n")


def _tokenizer(found: Vocabulary) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in found.merges)]
    ids = {token: i for i, token in enumerate(found.tokens)}
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, ignore_merges=found.pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _splitter(found.pre)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(found.tokens, found.types) if kind == _CONTROL]
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
        raise CheckpointError(f"GGUF pre-tokenizer {quoted(kind)} is not supported; {suggest(kind, kinds)}")
    return kinds[kind]


def _settings(found: Vocabulary) -> dict[str, object]:
    ids = found.ids("bos", "eos", "pad", "unk")
    settings: dict[str, object] = {f"{name}_token": found.tokens[i] for name, i in ids.items()}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    return {**settings, "chat_template": found.chat_template} if found.chat_template else settings
