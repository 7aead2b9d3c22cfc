"""``nemorun graft chat``: answers alone in a pipe, and a conversation on a real terminal."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graftwork import models
from graftwork.cli import chat as verb
from graftwork.cli.chat import ChatContext, Terminal
from graftwork.inference import generate
from graftwork.peft import LoRA
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

OPTIONS = ["max_new_tokens=6", "dtype=fp32"]
ASKED = ("a warm film", "a dull film")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a chat template, and an adapter."""
    root = tmp_path_factory.mktemp("chat")
    tiny_tokenizer(make_tiny("llama", root / "base", vocab_size=300), chat_template=None)
    model = models.load(root / "base", dtype="fp32")
    model.add_adapter(LoRA(dim=4))
    shake(model, 0.3)
    model.save_adapters(root / "adapter", verify=False)
    return root


def pipe(place: Path, monkeypatch: pytest.MonkeyPatch, lines: str, *args: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    context = ChatContext(name="chat", skip_confirmation=True)
    context.cli_execute(verb.chat, [f"base={place / 'base'}", *OPTIONS, *args])


def answers(place: Path, adapter: str | None) -> list[str]:
    said = generate(str(place / "base"), prompts=list(ASKED), adapter=adapter, max_new_tokens=6, dtype="fp32")
    return [" ".join(row["output"].splitlines()) for row in said]


@pytest.mark.parametrize("form", ["adapter={}", 'adapter=["{}"]', "adapter=[{}]"])
def test_a_pipe_gives_answers_and_nothing_else(
    form: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(place / "adapter")
    capsys.readouterr()
    pipe(place, monkeypatch, f"{ASKED[0]}\n\n{ASKED[1]}\n/quit\n{ASKED[0]}\n", form.format(adapter))
    printed = capsys.readouterr().out
    assert printed.splitlines() == answers(place, adapter) != answers(place, None)


@pytest.mark.parametrize(
    "lines, args, error",
    [
        ("/hello\n", [], "error: there is no command '/hello'; valid: /adapter, /compare, /system, /reset, /save"),
        ("x\n", ["run.executor=local"], "error: a chat stays in this terminal; leave run.executor out."),
        ("x\n", ["adapter=missing"], "missing"),
        ("x\n", ["top_p=2"], "error: top_p is 2.0"),
        ("x\n", ["system=kind"], "error: there is no place for a system message"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2(
    lines: str, args: list[str], error: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        pipe(place, monkeypatch, lines, *args)
    said = capsys.readouterr()
    assert ended.value.code == 2 and error in said.err and not said.out and said.err.count("\n") == 1


def test_ctrl_c_ends_an_answer_between_two_tokens_and_else_what_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    screen, before = Terminal(), signal.getsignal(signal.SIGINT)
    with screen.listening():
        with screen.answer():
            screen.piece("one")
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                screen.piece(" two")
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capsys.readouterr().out == "one two" and signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_terminal_talks_stops_goes_on_and_ends(place: Path) -> None:
    """On a pseudo-terminal: a question, Ctrl-C in the middle of a long answer, another question, Ctrl-D."""
    ours, theirs = pty.openpty()
    nemorun = Path(sys.executable).with_name("nemorun")
    words = [nemorun, "graft", "chat", f"base={place / 'base'}", "dtype=fp32", "max_new_tokens=120", "temperature=1.5"]
    done = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    screen = Screen(ours)
    screen.until("> ")
    assert "/help lists the commands" in screen.text
    os.write(ours, b"/hello\n")
    screen.until("error: there is no command '/hello'", "> ")
    for _ in range(4):  # an answer may end by itself
        os.write(ours, b"tell me a long story\n")
        screen.until("story\r\n")
        screen.more(3)
        done.send_signal(signal.SIGINT)
        screen.until("> ")
    assert "stopped" in screen.text
    os.write(ours, b"\x04")
    assert done.wait(60) == 0
    os.close(ours)


class Screen:
    """What a terminal has shown, and what of it was waited for."""

    def __init__(self, file: int) -> None:
        self.file, self.text, self.seen = file, "", 0

    def more(self, characters: int) -> None:
        """Wait for some more characters."""
        while len(self.text) < self.seen + characters:
            self.text += os.read(self.file, 1024).decode(errors="replace")

    def until(self, *words: str) -> None:
        """Wait until all of ``words`` have come in this order."""
        end = time.monotonic() + 120
        for word in words:
            while (found := self.text.find(word, self.seen)) < 0:
                assert time.monotonic() < end, self.text
                self.more(1 + len(self.text) - self.seen)
            self.seen = found + len(word)
