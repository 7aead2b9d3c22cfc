"""``nemorun graft chat``: a conversation in the terminal, or questions from a pipe, one a line."""

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Optional

import nemo_run as run
import typer

from graftwork.cli.context import GraftContext
from graftwork.cli.overrides import Maker, split_calls
from graftwork.errors import ConfigError, GraftworkError
from graftwork.inference.chat import Adapters, Session
from graftwork.inference.conversation import Conversation
from graftwork.models import load

PROMPT = "> "
QUOTES = "'\""


def chat(
    base: str,
    adapter: Optional[list[str]] = None,
    prompt_template: Optional[str] = None,
    task: Optional[str] = None,
    system: Optional[str] = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: Optional[int] = None,
    dtype: Optional[str] = "auto",
) -> None:
    """Talk with a base model, with an adapter or several to choose from.

    Without a terminal every line of the input is a question or a command, every answer a line of the output.

    Args:
        base: A recipe's name, a checkpoint directory or a name on Hugging Face's hub.
        adapter: Directory of an adapter, or a list of them: the first one answers, ``/adapter`` changes to another.
        prompt_template: Puts every question alone, such as ``Q: {input} A:``; default the one that the adapter was
            trained with, else the checkpoint's chat template.
        task: The prompt of a multi-task adapter that is to answer.
        system: Instruction that the conversation begins with.
        max_new_tokens: Longest answer, in tokens; less where the context ends.
        temperature: 0 takes the likeliest token, more draws.
        top_p: Draw from the likeliest tokens of this share only.
        seed: Makes the draws repeatable.
        dtype: ``bf16``, ``fp32`` or ``auto``, the checkpoint's.

    Raises:
        GraftworkError: for a missing file, an adapter of another base, in a pipe for an unknown command.
    """
    model = load(base, dtype=dtype)
    conversation = Conversation(
        model, prompt_template, task, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    adapters = Adapters(model, adapter or [])
    conversation.instruct(system)
    if sys.stdin.isatty():
        _talk(conversation, adapters)
        return
    session = Session(conversation, adapters, Pipe())
    for line in sys.stdin:
        if not session.take(line):
            return


class ChatContext(GraftContext):
    """Takes one adapter where a list is meant, and stays in this terminal."""

    def cli_execute(self, fn: Maker, args: list[str], entrypoint_type: str = "task") -> None:
        """Run the chat with ``adapter=DIR`` or ``adapter=[DIR,DIR]``."""
        super().cli_execute(fn, [_as_list(arg) for arg in args], entrypoint_type)

    def execute(self, task: run.Partial) -> None:
        """Refuse an executor: whoever asks sits here."""
        if self.executor is not None:
            raise ConfigError("a chat stays in this terminal; leave run.executor out.")
        super().execute(task)


class Pipe:
    """Answers on stdout, one a line whatever line breaks they have; all else on stderr."""

    width = 80

    def piece(self, text: str) -> None:
        """Write a piece of an answer in the line of the answer."""
        typer.echo(text.replace("\r", " ").replace("\n", " "), nl=False)

    def end(self) -> None:
        """End the line."""
        typer.echo()

    def note(self, text: str) -> None:
        """Write beside the answers."""
        typer.echo(text, err=True)


class Terminal(Pipe):
    """Answers as they are made; Ctrl-C stops the one that is being made, and clears a line that is being typed."""

    def __init__(self) -> None:
        self.width = shutil.get_terminal_size().columns
        self.answering = self.enough = False

    def piece(self, text: str) -> None:
        """Show a piece; raises KeyboardInterrupt where Ctrl-C was pressed since the answer began."""
        typer.echo(text, nl=False)
        if self.enough:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        """Show a line that is no answer."""
        typer.echo(text)

    def lines(self) -> Iterator[str]:
        """Yield what is typed, to Ctrl-D."""
        while True:
            try:
                yield input(PROMPT)
            except EOFError:
                typer.echo()
                return
            except KeyboardInterrupt:
                typer.echo()

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Let the first Ctrl-C inside the block end an answer between two tokens, a second one at once."""
        self.answering, self.enough = True, False
        try:
            yield
        finally:
            self.answering = self.enough = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear Ctrl-C inside the block."""
        before = signal.signal(signal.SIGINT, self._pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if not self.answering or self.enough:
            raise KeyboardInterrupt
        self.enough = True


def _talk(conversation: Conversation, adapters: Adapters) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines and remembers them
    screen = Terminal()
    session = Session(conversation, adapters, screen)
    screen.note(f"{session.describe()}. /help lists the commands.")
    with screen.listening():
        for line in screen.lines():
            try:
                with screen.answer():
                    if not session.take(line):
                        return
            except GraftworkError as error:
                screen.note(f"error: {error}")
            except KeyboardInterrupt:
                screen.note("stopped")


def _as_list(arg: str) -> str:
    """Return ``adapter=`` with a list of quoted paths, however they are typed; other words as they are."""
    value = arg.removeprefix("adapter=").strip()
    if not arg.startswith("adapter=") or value.lower() in ("none", ""):
        return arg
    listed = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return f"adapter={[path.strip(QUOTES) for path in split_calls(listed)]!r}"
