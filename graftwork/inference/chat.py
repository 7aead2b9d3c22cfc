"""chat: the lines that a user types, questions and commands, and what they do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from graftwork.errors import ConfigError, quoted, suggest
from graftwork.inference.carrier import Carrier
from graftwork.inference.compare import as_text, table
from graftwork.inference.conversation import Conversation
from graftwork.inference.output import write_jsonl
from graftwork.models import Model

BASE = "none"
"""How the base alone is called."""

COMMANDS = {
    "/adapter": ("NAME|none", "go on with another adapter, or with the base alone"),
    "/compare": ("", "show the base's answer to the last question beside the one that was given"),
    "/system": ("TEXT", "begin the conversation with this instruction; without TEXT, with none"),
    "/reset": ("", "forget what was said"),
    "/save": ("FILE", "write what was said as a row of a JSONL file, which data.train takes"),
    "/help": ("", "list the commands"),
    "/quit": ("", "end the chat"),
}
"""Every command with what follows it, and what it does."""


class Screen(Protocol):
    """Where a chat is shown."""

    width: int

    def piece(self, text: str) -> None:
        """Show the next piece of an answer; raises KeyboardInterrupt where the user has enough of it."""

    def end(self) -> None:
        """Show that the answer is over."""

    def note(self, text: str) -> None:
        """Show what is no answer."""


@dataclass(frozen=True)
class Choice:
    """A directory of adapters, and how it is called: by the adapters in it, by its path where two are called alike."""

    name: str
    path: str


def choices(paths: Sequence[str]) -> list[Choice]:
    """Return what directories of adapters are called; raises ArtifactError for one that is not there."""
    names = ["+".join(Carrier.of(path).names) or Path(path).name for path in paths]
    return [Choice(path if names.count(name) > 1 else name, path) for name, path in zip(names, paths, strict=True)]


class Adapters:
    """Directories of adapters of which one at a time acts on a model, or none.

    Each is loaded once at first, so that one that does not fit is told before anything is asked. Raises GraftworkError.
    """

    def __init__(self, model: Model, paths: Sequence[str]) -> None:
        self.model, self.choices = model, choices(paths)
        self.chosen = BASE
        for choice in reversed(self.choices):
            self.choose(choice.name)

    @property
    def names(self) -> list[str]:
        """What ``choose`` takes."""
        return [*(choice.name for choice in self.choices), BASE]

    def choose(self, name: str) -> None:
        """Let the adapters of one directory act, by its name or path, or none; raises ConfigError for another one."""
        found = next((choice for choice in self.choices if name in (choice.name, choice.path)), None)
        if found is None and name != BASE:
            raise ConfigError(f"no adapter is called {quoted(name)}; {suggest(name, self.names)}")
        for held in list(self.model.adapters):
            self.model.delete_adapter(held)
        self.chosen = BASE
        if found is not None:
            self.model.load_adapters(found.path, trainable=False)
            self.chosen = found.name


class Session:
    """A chat: ``take`` its lines one by one."""

    def __init__(self, conversation: Conversation, adapters: Adapters, screen: Screen) -> None:
        self.conversation, self.adapters, self.screen = conversation, adapters, screen
        self._does: dict[str, Callable[[str], None]] = {
            "/adapter": self._adapter,
            "/compare": self._compare,
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }

    def take(self, line: str) -> bool:
        """Do what a line says, and tell whether the chat goes on; raises GraftworkError for what cannot be done."""
        line = line.strip()
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command in self._does:
            self._does[command](rest.strip())
        elif line.startswith("/"):
            raise ConfigError(f"there is no command {quoted(command)}; valid: {', '.join(COMMANDS)}.")
        elif line:
            self._ask(line)
        return True

    def describe(self) -> str:
        """Return how questions are put, and to whom."""
        template = self.conversation.template
        how = "the chat template" if template is None else f"the template {template!r}, one question at a time"
        who = "the base alone" if self.adapters.chosen == BASE else f"adapter {self.adapters.chosen}"
        return f"{who}, by {how}"

    def _ask(self, question: str) -> None:
        reply = self.conversation.ask(question, self.screen.piece)
        self.screen.end()
        if reply.dropped:
            context = self.conversation.model.shape.max_position_embeddings
            self.screen.note(
                f"the context of {context} tokens is full: the oldest {reply.dropped} turns are left out from here on"
            )
        if not reply.whole:
            self.screen.note("stopped")

    def _adapter(self, name: str) -> None:
        if name:
            self.adapters.choose(name)
            self.screen.note(self.describe())
        else:
            self.screen.note(f"{self.describe()}; valid: {', '.join(self.adapters.names)}")

    def _compare(self, _: str) -> None:
        conversation = self.conversation
        reply = conversation.ask_base(self._nothing)
        made = table(None, ["the base", "was answered"])
        made.add_row(reply.text, conversation.turns[-1]["content"])
        self.screen.note(as_text([made], self.screen.width).rstrip("\n"))

    def _nothing(self, _: str) -> None:
        self.screen.piece("")  # it hears of an interruption

    def _system(self, text: str) -> None:
        self.conversation.instruct(text)
        self.screen.note("the conversation begins with that" if text else "there is no system message")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.screen.note("forgotten")

    def _save(self, file: str) -> None:
        if not file:
            raise ConfigError("/save needs a file: /save FILE.")
        if not self.conversation.turns:
            raise ConfigError("nothing was said yet; there is nothing to save.")
        write_jsonl(file, [{"messages": self.conversation.messages}])
        self.screen.note(f"wrote {file}")

    def _help(self, _: str) -> None:
        width = max(len(f"{name} {what}") for name, (what, _) in COMMANDS.items())
        lines = [f"{f'{name} {what}':<{width}}  {does}" for name, (what, does) in COMMANDS.items()]
        self.screen.note("\n".join([*lines, "Ctrl-C stops an answer, Ctrl-D ends the chat."]))
