"""The tokenizer as the data need it: pieces of text to ids that join exactly, BOS, EOS and a fingerprint."""

import hashlib
import json
from typing import Any, Optional

from graftwork.errors import ConfigError, DataError


def load_tokenizer(path: str) -> Any:
    """Load a Hugging Face tokenizer from a directory or the local cache; raises DataError saying what is missing."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"no tokenizer can be read from {path!r} ({reason}); "
            "give a directory with tokenizer.json and tokenizer_config.json."
        ) from error


def fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides which ids a text gets, the chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are left over from earlier calls and change nothing here.
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        rules = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
    parts = [rules, tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class TextEncoder:
    """Turns text into ids without special tokens, and knows which of BOS and EOS belong to a sequence.

    ``add_bos=None`` means: as the tokenizer itself does. Raises ConfigError where a wanted token does not exist.
    """

    def __init__(self, tokenizer: Any, add_bos: Optional[bool] = None, add_eos: bool = True) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        own = self.bos is not None and self.bos in tokenizer("a")["input_ids"][:1]
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

    def starting(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that begin a sequence."""
        return self._ids(texts)

    def continuing(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that follow other text, such that decoding the joined ids gives the joined texts."""
        if not self._marks_start:
            return self._ids(texts)
        anchor = self._ids(["\n"])[0]
        return [
            ids[len(anchor) :] if ids[: len(anchor)] == anchor else plain
            for ids, plain in zip(self._ids(["\n" + text for text in texts]), self._ids(texts))
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: sequences beyond the model's length are cut here, the tokenizer need not warn.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
