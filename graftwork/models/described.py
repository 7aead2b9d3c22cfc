"""What a base model says of itself, read without its weights: config.json, GGUF metadata, the hub's small files."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from graftwork.data.tokenizer import FILES, Tokenizer, checkpoint_tokenizer
from graftwork.models.shape import Shape
from graftwork.models.weights import check_architecture, family_of, read_config, shape_from_hf
from graftwork.models.weights.gguf import described_by
from graftwork.models.weights.gguf_tokenizer import write_tokenizer
from graftwork.models.weights.hub import Conversion, find

CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Description:
    """A base as its files describe it: ``kind`` of model, sizes, number format as config.json names it.

    ``tokenizer``: that of a base with a chat template, None for one without.
    """

    kind: str
    shape: Shape
    dtype: str
    tokenizer: Tokenizer | None = None


def describe(base: str) -> Description:
    """Return what ``base``, a directory, GGUF file, hub id or registered name, says of itself.

    Of a hub's model that is not on this machine config and tokenizer are downloaded, not the weights. Raises
    CheckpointError when there is no such base, or no class of models that it could become.
    """
    found = find(base)
    if isinstance(found, Conversion):
        return _of_gguf(found.locate())
    directory = found if isinstance(found, Path) else found.described()
    config = read_config(directory)
    check_architecture(config)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return Description(family_of(config).kind, shape_from_hf(config), str(dtype), _chat_tokenizer(directory))


def _of_gguf(path: Path) -> Description:
    """Describe the checkpoint that a GGUF file will become."""
    shape, read_vocabulary = described_by(path)
    vocabulary, tokenizer = read_vocabulary(), None
    if vocabulary.chat_template:
        with tempfile.TemporaryDirectory() as directory:
            write_tokenizer(vocabulary, Path(directory))
            tokenizer = checkpoint_tokenizer(directory)
    return Description("gpt", shape, "bfloat16", tokenizer)


def _chat_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer where its files hold a chat template: reading one takes seconds."""
    settings = directory / "tokenizer_config.json"
    told = (directory / CHAT_TEMPLATE).is_file() or (settings.is_file() and b'"chat_template"' in settings.read_bytes())
    if not told or not any((directory / name).is_file() for name in FILES):
        return None
    tokenizer = checkpoint_tokenizer(directory)
    return tokenizer if tokenizer.chat_template else None
