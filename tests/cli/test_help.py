"""Help: every field of every verb with what it means, and examples that can be typed as they are printed."""

import inspect
import re
import shlex
from pathlib import Path
from pkgutil import resolve_name

import nemo_run as run
import pytest

from graftwork.cli import factories
from graftwork.cli.arguments import OPTION_HELP, OPTIONS
from graftwork.cli.context import check_complete
from graftwork.cli.help import GROUPS, NESTED, described, kind, tell
from graftwork.cli.verbs import VERBS, Verb
from tests.helpers.tiny_hf import make_tiny

VERB = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("base"))


def printed(verb: Verb, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    tell(verb, resolve_name(verb.place), [])
    return capsys.readouterr().out


@VERB
def test_every_field_is_named_with_what_it_means(
    verb: Verb, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(verb, capsys, monkeypatch)
    functions = [resolve_name(verb.place), *([resolve_name(VERBS[0].place)] if verb.trains else [])]
    for function in functions:
        fields, texts = list(inspect.signature(function).parameters), described(function)
        assert list(texts) == fields, "a line for each, in the order of the call"
        for name in fields:
            assert len(texts[name].split()) > 1 and texts[name].endswith("."), name
            [row, *_] = re.findall(rf"^    {name} +\S.*$", text, re.MULTILINE)
            assert texts[name].split()[0] in row, row


def test_what_stands_inside_of_a_recipe_is_described_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(VERBS[0], capsys, monkeypatch)
    for path, (place, shown) in NESTED.items():
        _, _, section = text.partition(f"\n{path}FIELD, of ")
        section, _, _ = section.partition("\n\n")
        thing = resolve_name(place)
        names = shown or list(inspect.signature(thing).parameters)
        assert set(names) <= set(described(thing)), place
        for name in names:
            [row] = re.findall(rf"^    {name} +\S.*$", section, re.MULTILINE)
            assert described(thing)[name].split()[0] in row, row


@VERB
def test_examples_are_printed_as_they_are_typed_and_parse(
    verb: Verb, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(verb, capsys, monkeypatch)
    assert verb.examples and [line for line in text.splitlines() if line.strip() in verb.examples] == [
        f"  {example}" for example in verb.examples
    ]
    factories.register()
    for example in verb.examples:
        words = shlex.split(
            re.sub(r'^.*\| |^eval "\$\(|\)"$', "", example.replace("path/to/checkpoint", str(checkpoint)))
        )
        assert words[:3] == ["nemorun", "graft", verb.name]
        assert parsed(verb, words[3:]) is not None


def parsed(verb: Verb, words: list[str]) -> run.Partial | None:
    """What the context of a verb makes of words, which it does not run."""
    found: list[run.Partial] = []
    context = type("Parsed", (resolve_name(verb.context),), {"execute": lambda self, task: found.append(task)})
    factory = words[words.index("--factory") + 1] if "--factory" in words else None
    rest = [word for word in words if word not in ("--factory", factory, "--yes", "--dryrun")]
    context(name=verb.name, factory=factory, skip_confirmation=True).cli_execute(resolve_name(verb.place), rest)
    for task in found:
        check_complete(task)
    return found[0] if found else None


def test_an_example_that_cannot_be_typed_is_found() -> None:
    verb = next(verb for verb in VERBS if verb.name == "combine")
    with pytest.raises(SystemExit):
        parsed(verb, ["adapters=[/a/adapter,/b/adapter]", "weights=[1,1]", "output=both"])


def test_groups_hold_each_field_once_and_options_are_described() -> None:
    names = [name for names in GROUPS.values() for name in names if name != "seed"]
    assert len(names) == len(set(names)) and list(OPTION_HELP) == list(OPTIONS)


def test_types_are_told_as_they_are_typed() -> None:
    def call(a: int, b: list[str] | None, c: "dict[str, int]") -> None: ...

    assert [kind(p.annotation) for p in inspect.signature(call, eval_str=True).parameters.values()] == [
        "int", "list[str]", "dict[str, int]",
    ]  # fmt: skip
