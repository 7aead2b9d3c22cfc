"""PromptTuning and PTuning <-> a table of rows; of P-tuning what its encoder has made, all that inference needs."""

from collections.abc import Mapping
from typing import Any

import torch

from graftwork.errors import ConfigError
from graftwork.models.exchange.fields import Fields
from graftwork.models.exchange.lazy import Held, Lazy
from graftwork.models.exchange.piece import common
from graftwork.models.exchange.places import Places
from graftwork.models.shape import Shape
from graftwork.peft.methods import PromptTuning
from graftwork.peft.methods.prompt_table import PromptMethod

KEY, TABLE = "prompt_embeddings", "table"
_SITE = "embedding.word_embeddings"


def check_placement(transform: PromptMethod, places: Places, bos: bool | None) -> None:
    """Raise ConfigError unless the virtual tokens stand in front of everything else; ``bos``: whether rows have one."""
    if transform.placement == "before_bos" or (transform.placement == "prefix" and (places.seq2seq or bos is False)):
        return
    where = "where a template says" if transform.placement == "template" else "behind BOS"
    raise ConfigError(
        f"{transform} has placement={transform.placement!r}: its virtual tokens stand {where}, but Hugging Face PEFT "
        'puts them in front of everything; train it with placement="before_bos", or on rows without BOS '
        "(add_bos=False)."
    )


def tables_of(transform: PromptMethod, shape: Shape, tensors: Held) -> dict[str, Lazy]:
    """Return the table [length, hidden] of each task, of the whole adapter under ""."""
    lengths = transform.tasks or {"": transform.virtual_tokens}
    found = {}
    for task, length in lengths.items():
        stem = f"{_SITE}.tasks.{task}." if task else f"{_SITE}."
        found[task] = tensors.take(stem + TABLE, length, shape.hidden_size)
    if isinstance(transform, PromptTuning):
        tensors.finish()  # of P-tuning the encoder is left
    return found


def config_of(places: Places, shape: Shape, length: int, base: str | None) -> dict[str, object]:
    """Return ``adapter_config.json`` of a table of ``length`` rows."""
    return {
        **common("SEQ_2_SEQ_LM" if places.seq2seq else "CAUSAL_LM", base),
        "num_attention_heads": shape.num_attention_heads,
        "num_layers": shape.num_layers,
        "num_transformer_submodules": 2 if places.seq2seq else 1,
        "num_virtual_tokens": length,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "token_dim": shape.hidden_size,
    }


def keyed(table: Lazy, places: Places) -> Mapping[str, Lazy]:
    """Return the table as Hugging Face PEFT calls it, with rows for a decoder, never read, where there is one."""
    if not places.seq2seq:
        return {KEY: table}
    length, hidden = table.shape
    return {KEY: Lazy((2 * length, hidden), lambda: torch.cat([table[:], torch.zeros(length, hidden)]))}


def arriving(
    fields: Fields, places: Places, shape: Shape, held: Held, name: str | None
) -> tuple[PromptTuning, dict[str, Lazy], bool, str]:
    """Return the PromptTuning that a Hugging Face prompt is here: of P-tuning no encoder is in the file."""
    length, hidden, stacks = fields.whole("num_virtual_tokens"), fields.whole("token_dim"), 2 if places.seq2seq else 1
    if hidden != shape.hidden_size:
        fields.refuse("token_dim", f"the model's hidden size is {shape.hidden_size}")
    if fields.config.get("num_transformer_submodules", stacks) not in (None, stacks):
        fields.refuse("num_transformer_submodules", f"a {places.family.name} has {stacks}")
    table = held.take(KEY, length * stacks, hidden)
    held.finish()
    options: dict[str, Any] = {"virtual_tokens": length, "init": "random", "placement": "before_bos"}
    transform = PromptTuning(**options) if name is None else PromptTuning(name, **options)
    note = "the file holds no encoder, so its table is what trains from now on" if fields.kind == "P_TUNING" else ""
    # Hugging Face PEFT never reads the rows behind them, which a decoder would have.
    rows = Lazy((length, hidden), lambda: table[:length])
    return transform, {f"{_SITE}.{TABLE}": rows}, False, note
