"""Prompt tuning: virtual tokens whose embeddings are trained themselves (Lester et al. 2021, arXiv 2104.08691)."""

from collections.abc import Mapping
from copy import copy
from typing import Optional, Self, Union

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError, quoted
from graftwork.peft.adapter import Birth, normal
from graftwork.peft.methods.prompt_table import VIRTUAL_TOKENS, PromptMethod, PromptTable
from graftwork.peft.sites import Host
from graftwork.virtual_tokens import PromptSlot

INITS = ("vocab", "text", "random")


class TrainedPrompt(PromptTable):
    """A trained table [length, hidden]: drawn, or copied from the rows of words that the base knows."""

    table: nn.Parameter

    def __init__(self, birth: Birth, base: nn.Module, slot: PromptSlot, method: "PromptTuning", host: Host) -> None:
        super().__init__(birth, base, slot)
        shape = (slot.length, host.config.hidden_size)
        if method.init == "random":
            self.new_matrix("table", shape, normal(method.init_std))
            return
        text, generator = method.text_of(slot.task), birth.generator("table")
        # Tokenised here and not when it is derived, so that every rank hears of a missing tokenizer in time.
        ids = (
            torch.randint(host.vocab_size, (slot.length,), generator=generator)
            if text is None
            else _in_turn(_tokenized(text, host, str(method)), slot.length)
        )
        self.derive_matrix("table", shape, lambda: self.base_rows(base, ids))

    def derive(self) -> None:
        """Compute the initial values that depend on the base; remember the table as it is born."""
        super().derive()
        self._born = self.table.detach().clone()

    def rows(self) -> Tensor:
        """Return the table."""
        return self.table

    def moved(self) -> bool:
        """Tell whether the table is another than it was at birth."""
        return not torch.equal(self.table.detach(), self._born.to(self.table.device))


class PromptTuning(PromptMethod):
    """Virtual tokens whose embeddings are trained, placed in front of every input.

    Args:
        name: Unique name of this adapter in its model.
        virtual_tokens: Number of virtual tokens.
        init: ``vocab`` (embeddings of words drawn from the vocabulary), ``text`` (those of ``init_text``, repeated or
            cut to length) or ``random``.
        init_text: The text of ``init="text"``: one for all tasks, or one for each.
        init_std: Standard deviation of ``init="random"``; 1 is that of HF PEFT.
        placement: ``prefix`` (after BOS), ``before_bos`` (HF PEFT's place) or ``template`` (where a prompt template
            says ``{virtual:NAME}``).
        tasks: Number of virtual tokens of each task; a row's field ``task`` picks its prompt.
    """

    default_lr = 1e-2
    by_task = ("tasks", "init_text")

    def __init__(
        self,
        name: str = "prompt_tuning",
        virtual_tokens: int = VIRTUAL_TOKENS,
        init: str = "vocab",
        init_text: Optional[Union[dict[str, str], str]] = None,
        init_std: float = 1.0,
        placement: str = "prefix",
        tasks: Optional[dict[str, int]] = None,
    ) -> None:
        super().__init__(name)
        self.init = self.one_of("init", init, INITS)
        self.init_std = self.positive("init_std", init_std)
        self.init_text = init_text
        self.place(virtual_tokens, placement, tasks)

    def table(self, birth: Birth, base: nn.Module, slot: PromptSlot, host: Host) -> PromptTable:
        """Return the table of one prompt."""
        return TrainedPrompt(birth, base, slot, self, host)

    def text_of(self, task: str | None) -> str | None:
        """Return the text that the prompt of ``task`` starts from; None: from no text."""
        return self.init_text[task or ""] if isinstance(self.init_text, dict) else self.init_text

    def with_tasks(self, tasks: Mapping[str, int], texts: Mapping[str, str] | None = None) -> Self:
        """Return this transform with further ``tasks``, and their ``texts`` where each task starts from its own."""
        if texts is None:
            return super().with_tasks(tasks)
        if not isinstance(self.init_text, dict):
            raise ConfigError(f"{self} has no init_text by task; leave the new tasks' init_text out.")
        other = copy(self)
        other.init_text = {**self.init_text, **texts}
        return other.with_tasks(tasks)

    def check_tasks(self) -> None:
        """Raise ConfigError unless every task has a name and a length, and a text where it starts from one."""
        super().check_tasks()
        texts = self.init_text
        if (self.init == "text") != (texts is not None):
            raise ConfigError(
                f"{self}: init={self.init!r}, but init_text is {quoted(texts)}; init='text' and a text go together."
            )
        if texts is None or isinstance(texts, str):
            return
        if self.tasks is None or set(texts) != set(self.tasks):
            raise ConfigError(
                f"{self}: init_text is given for {', '.join(map(str, texts)) or 'no task'}; give one text, or one for "
                f"each task: {', '.join(self.tasks or ()) or 'there are none'}."
            )


def _tokenized(text: str, host: Host, who: str) -> list[int]:
    if host.tokenize is None:
        raise ConfigError(f"{who}: init='text' needs a tokenizer, but this model has none.")
    ids = host.tokenize(text)
    if not ids:
        raise ConfigError(f"{who}: init_text {quoted(text)} has no token; give a text that the tokenizer knows.")
    return ids


def _in_turn(ids: list[int], length: int) -> Tensor:
    """Repeat or cut ``ids`` to ``length``."""
    return torch.tensor(ids).repeat(-(-length // len(ids)))[:length]
