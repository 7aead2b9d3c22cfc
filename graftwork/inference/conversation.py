"""A conversation with a model: what was said so far, and the next answer as it is made."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Unpack

from graftwork.data.tokenizer import Tokenizer
from graftwork.errors import ConfigError
from graftwork.inference.examples import Examples
from graftwork.inference.generate import answer
from graftwork.models import Model
from graftwork.models.generation.decoding import Decoding, Options

PLAIN = "{input}"
"""The template of adapters that were given none: it says nothing of how a question is put."""

Tell = Callable[[str], None]
"""Takes the next piece of an answer; it is called for every token, also where no character is complete yet."""

Message = dict[str, str]

_OPEN_END = re.compile(r"[\s\ufffd]+$")


@dataclass(frozen=True)
class Reply:
    """An answer; ``dropped``: turns that did not fit the context any more; not ``whole`` where it was interrupted."""

    text: str
    dropped: int = 0
    whole: bool = True


class Growing:
    """The text of tokens that come one by one, in pieces that join to the text of all of them.

    A character may be several tokens long: its beginning waits for the rest. So do spaces, which may be the last ones.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ids, self.told = tokenizer, list[int](), ""

    def add(self, token: int) -> str:
        """Return what can be told now that ``token`` is known."""
        self.ids.append(token)
        return self._tell(_OPEN_END.sub("", self._text()))

    def rest(self) -> str:
        """Return what no further token will complete."""
        return self._tell(self._text().rstrip())

    def _text(self) -> str:
        # A tokenizer that tidies spaces up would rewrite what was told already.
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.lstrip()

    def _tell(self, text: str) -> str:
        if not text.startswith(self.told):
            return ""
        new, self.told = text[len(self.told) :], text
        return new


class Conversation:
    """Questions to a model, each with what was said before it where the model knows conversations.

    It does by the chat template of its tokenizer. Without one, with a ``prompt_template``, or with adapters that were
    trained with a template of their own, every question is put alone and by that template. ``task`` names the prompt of
    a multi-task adapter; options as in ``generate``.
    """

    def __init__(
        self,
        model: Model,
        prompt_template: str | None = None,
        task: str | None = None,
        max_new_tokens: int = 256,
        **options: Unpack[Decoding],
    ) -> None:
        model.configure_model()
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, but it must be at least 1.")
        self.model, self.prompt_template, self.task = model, prompt_template, task
        self.max_new_tokens, self.options = max_new_tokens, options
        self.system: str | None = None
        self.turns: list[Message] = []
        self._start = 0

    @property
    def template(self) -> object:
        """The template by which every question is put alone; None where the chat template tells the conversation."""
        own = self.prompt_template or self.model.prompt_format().get("prompt_template", PLAIN)
        known = not self.model.seq2seq and self.model.tokenizer.chat_template is not None
        return None if known and own == PLAIN and self.prompt_template is None else own

    @property
    def messages(self) -> list[Message]:
        """All that was said, as a row of a data file holds it."""
        return self._with_system(self.turns)

    def instruct(self, system: str | None) -> None:
        """Begin the conversation with a system message, or none; raises ConfigError where there is no place for it."""
        if system and self.template is not None:
            raise ConfigError(
                f"there is no place for a system message: questions are put one by one, by the template "
                f"{self.template!r}."
            )
        self.system = system or None

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns, self._start = [], 0

    def ask(self, question: str, tell: Tell) -> Reply:
        """Answer ``question``, told piece by piece; the oldest turns are left out once they do not fit the context.

        A KeyboardInterrupt ends the answer, and what there is of it counts as said. Raises GraftworkError, and forgets
        the question, where it cannot be put.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        start, room = self._fitting(turns)
        reply = self._answer(turns[start:], room, tell)
        if reply.whole or reply.text:
            self.turns = [*turns, {"role": "assistant", "content": reply.text}]
            before, self._start = self._start, start
            return Reply(reply.text, start - before, reply.whole)
        return reply

    def ask_base(self, tell: Tell) -> Reply:
        """Answer the last question again, put in the same way, without adapters; nothing of it counts as said.

        Raises ConfigError where nothing was asked.
        """
        if not self.turns:
            raise ConfigError("nothing was asked yet; ask something, then compare.")
        turns = self.turns[:-1]
        with self.model.adapters_disabled() if self.model.adapters else nullcontext():
            start, room = self._fitting(turns)
            return self._answer(turns[start:], room, tell)

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]

    def _examples(self, turns: list[Message]) -> Examples:
        if self.template is None:
            return Examples.from_messages(self._with_system(turns), self.task)
        return Examples.from_prompts([turns[-1]["content"]], self.prompt_template, self.task)

    def _fitting(self, turns: list[Message]) -> tuple[int, int]:
        """Return the first turn to be put, so that there is room for an answer, and how many tokens that may have."""
        limit = self.model.shape.max_position_embeddings
        wanted = min(self.max_new_tokens, limit // 2)
        start = self._start
        while True:
            [length] = self._examples(turns[start:]).lengths(self.model)
            if self.template is not None or length + wanted <= limit or start + 2 >= len(turns):
                break
            start += 2
        if length >= limit:
            raise ConfigError(f"the question has {length} tokens, but the model's context is {limit}; shorten it.")
        return start, min(self.max_new_tokens, limit - length)

    def _answer(self, turns: list[Message], room: int, tell: Tell) -> Reply:
        text = Growing(self.model.tokenizer)
        how: Options = {**self.options, "max_new_tokens": room, "each": lambda _, token: tell(text.add(token))}
        try:
            answer(self.model, self._examples(turns), **how)
        except KeyboardInterrupt:
            return Reply(text.told, whole=False)
        tell(text.rest())
        return Reply(text.told)
