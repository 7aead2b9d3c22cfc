"""The tokenizer as the data need it: pieces of text to ids that join exactly, BOS, EOS and a fingerprint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional, Protocol, overload

from graftwork.errors import CheckpointError, ConfigError, DataError, quoted

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A checkpoint directory with a tokenizer has one of these."""

FEW = 0.01
"""Share of the ids that may mean another word in a tokenizer that still is the same."""

_ANCHORS = ["\n", ":"]
"""What a text is put behind to get its ids without the space of a beginning; T5's tokenizers drop a line break."""

_UNREADABLE = (OSError, ValueError, ImportError, KeyError)


class Tokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer (transformers' ``PreTrainedTokenizerBase``)."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    eos_token: str | None
    chat_template: str | None
    is_fast: bool
    special_tokens_map: Mapping[str, object]

    @overload
    def __call__(self, text: str, **options: bool) -> Mapping[str, list[int]]: ...

    @overload
    def __call__(self, text: list[str], **options: bool) -> Mapping[str, list[list[int]]]: ...

    def __len__(self) -> int: ...

    def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool = ...
    ) -> str:
        """Return the text of ``token_ids``."""

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """Return the text of each sequence of ids."""

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the vocabulary's entry of every id."""

    def get_vocab(self) -> dict[str, int]:
        """Return every entry of the vocabulary with its id."""

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        tokenize: bool,
        add_generation_prompt: bool,
        **told: str,
    ) -> str:
        """Return the conversation as text, with the tools that its assistant may call.

        ``told``: what else the template may read.
        """

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Write the tokenizer's files."""


def load_tokenizer(path: str) -> Tokenizer:
    """Load a Hugging Face tokenizer from a directory or the local cache; raises DataError saying what is missing."""
    try:
        return _read(path)
    except _UNREADABLE as error:
        raise DataError(
            f"no tokenizer can be read from {quoted(path)} ({_reason(error)}); "
            "give a directory with tokenizer.json and tokenizer_config.json."
        ) from error


def checkpoint_tokenizer(directory: str | Path) -> Tokenizer:
    """Return the fast tokenizer of a checkpoint's ``directory``, read from its files only.

    Raises CheckpointError when there are none, or they cannot be read.
    """
    folder = Path(directory)
    if not any((folder / name).is_file() for name in FILES):
        raise CheckpointError(f"{str(folder)!r} has no tokenizer; one of {', '.join(FILES)} is needed.")
    try:
        tokenizer = _read(folder)
    except _UNREADABLE as error:
        reason = _reason(error).rstrip(".")
        raise CheckpointError(f"the tokenizer of {str(folder)!r} cannot be read: {reason}.") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"the tokenizer of {str(folder)!r} has no fast form; a tokenizer.json is needed.")
    return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of everything that decides which ids a text gets, the chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are left over from earlier calls and change nothing here.
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        rules = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
    parts = [rules, tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def check_same_words(own: Tokenizer, model_own: Tokenizer, path: str) -> None:
    """Raise ConfigError when the tokenizer of ``path`` gives other ids than the model's own.

    A few renamed or added words are no other tokenizer: chat markers are made like this.
    """
    ours, theirs = ({i: word for word, i in t.get_vocab().items()} for t in (own, model_own))
    shared = ours.keys() & theirs.keys()
    differing = sum(ours[i] != theirs[i] for i in shared)
    if differing > FEW * len(shared):
        raise ConfigError(
            f"tokenizer={quoted(path)} gives other ids than the model's own: {differing} of {len(shared)} ids mean "
            "another word; leave tokenizer out, or give the one that the base was trained with."
        )


def check_ids(largest: int, vocabulary: int | None, path: str) -> None:
    """Raise DataError when the rows of ``path`` hold an id that a model of ``vocabulary`` words does not have."""
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            f"the rows of {quoted(path)} hold the token id {largest}, but the model's vocabulary ends at "
            f"{vocabulary - 1}; use the tokenizer of the model's checkpoint."
        )


class TextEncoder:
    """Turns text into ids without special tokens, and knows which of BOS and EOS belong to a sequence.

    ``add_bos=None`` means: as the tokenizer itself does. Raises ConfigError where a wanted token does not exist.
    """

    def __init__(self, tokenizer: Tokenizer, add_bos: Optional[bool] = None, add_eos: bool = True) -> None:
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id
        self.eos = tokenizer.eos_token_id
        alone = tokenizer("a")["input_ids"]
        own = self.bos is not None and self.bos in alone[:1]
        self._closes = self.eos is not None and alone[-1:] == [self.eos]
        self.add_bos = own if add_bos is None else add_bos
        self.add_eos = add_eos
        if (self.add_bos and self.bos is None) or (add_eos and self.eos is None):
            name = "eos" if add_eos and self.eos is None else "bos"
            raise ConfigError(f"the tokenizer has no {name} token; set add_{name}=False or use another tokenizer.")
        # SentencePiece-like tokenizers put a space before any text; a continuation must not get it.
        self._marks_start = "".join(tokenizer.convert_ids_to_tokens(self._ids(["a"])[0])).startswith("▁")

    @property
    def pad(self) -> int:
        """Id that fills unused positions; masks go by position, so it may equal EOS."""
        found = (i for i in (self.tokenizer.pad_token_id, self.eos, 0) if i is not None)
        return next(found)

    @property
    def head(self) -> list[int]:
        """BOS, where it begins a sequence."""
        return [self.bos] if self.add_bos and self.bos is not None else []

    @property
    def end(self) -> list[int]:
        """EOS, where it ends a sequence."""
        return [self.eos] if self.add_eos and self.eos is not None else []

    @property
    def source_end(self) -> list[int]:
        """EOS, where the tokenizer itself ends a text with it, as T5's does: what an encoder reads then ends so."""
        return [self.eos] if self._closes and self.eos is not None else []

    def starting(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that begin a sequence."""
        return self._ids(texts)

    def continuing(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that follow other text, such that decoding the joined ids gives the joined texts."""
        if not self._marks_start:
            return self._ids(texts)
        before, anchor = next((pair for pair in zip(_ANCHORS, self._ids(_ANCHORS)) if pair[1]), ("", []))
        return [
            ids[len(anchor) :] if ids[: len(anchor)] == anchor else plain
            for ids, plain in zip(self._ids([before + text for text in texts]), self._ids(texts))
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: sequences beyond the model's length are cut here, the tokenizer need not warn.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _read(path: str | Path) -> Tokenizer:
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
        path,
        local_files_only=True,
        trust_remote_code=False,  # None would ask on a terminal
    )
    return tokenizer


def _reason(error: Exception) -> str:
    return quoted((str(error).strip() or type(error).__name__).splitlines()[0], bare=True)
