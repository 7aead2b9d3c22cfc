"""Tables that follow from the registries, the sources and the tests say what is in them; pictures are as drawn."""

import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork import errors
from graftwork.errors import GraftworkError, where_to_read
from graftwork.layout import Layout
from graftwork.models.shapes import smollm2_135m
from graftwork.parallel.tensor_index import DamagedError
from graftwork.peft import METHODS, LoRA
from tests.helpers import compatibility, messages
from tests.helpers.arguments import meanings_of
from tests.helpers.derived import BLOCKS, DOCS, blocks, faults, names, pages, text
from tests.helpers.drawings import DIRECTORY, DRAWINGS, file_of
from tests.parallel.breaks import BREAKS as MISTAKES


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_page_says_what_the_registries_hold(page: Path) -> None:
    assert page.read_text() == text(page), "a new entry? run `make golden` and review the diff"


def test_every_block_stands_somewhere() -> None:
    assert {name for page in pages() for name in blocks(page)} == set(BLOCKS)


def test_names_are_those_the_command_line_takes() -> None:
    factory, peft, executor = names().splitlines()[2:]
    assert "`smollm2_135m`" in factory and "`canonical_adapter`" in peft and "`local`" in executor


def test_a_planted_fault_is_told_once_on_one_line_and_stands_in_a_test() -> None:
    assert len({fault.told for fault in faults()}) == len(faults())
    for told, caught, file, function in faults():
        assert all(words and "\n" not in words and "|" not in words for words in (told, caught)), function
        assert function.startswith("test_") or function in MISTAKES, f"{file}: {function} is no test"


def test_pictures_are_as_drawn_and_shown() -> None:
    assert sorted(DIRECTORY.iterdir()) == sorted(map(file_of, DRAWINGS)), "a new one? run `make golden`"
    for name, drawing in DRAWINGS.items():
        assert file_of(name).read_text() == drawing().svg(), name
        assert f"(../images/methods/{name}.svg)" in (DOCS / "methods" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_every_argument_has_a_meaning(name: str) -> None:
    assert set(meanings_of(METHODS[name])) == set(inspect.signature(METHODS[name]).parameters)


RAISED: list[tuple[Callable[[], object], str]] = [
    (lambda: LoRA(dim=0), "ConfigError"),
    (lambda: LoRA(name="a.b"), "ConfigError"),
    (lambda: Layout(tensor_model_parallel_size=2).check_shape(smollm2_135m()), "ParallelismError"),
]


@pytest.mark.parametrize(("cause", "kind"), RAISED)
def test_what_is_raised_is_listed(cause: Callable[[], object], kind: str) -> None:
    with pytest.raises(GraftworkError) as caught:
        cause()
    listed = [m for m in messages.messages() if m.kind == kind and pattern(m.words).fullmatch(str(caught.value))]
    assert listed, caught.value
    assert any(len("".join(_gaps(m.words)[::2])) > 15 for m in listed), "words of its own, not gaps alone"
    assert not any(pattern(m.words).fullmatch("a sentence that nothing raises") for m in listed)


def pattern(words: str) -> re.Pattern[str]:
    """Return what a sentence with gaps may be."""
    return re.compile("".join(".*" if re.fullmatch(r"<\w+>|\.\.\.", p) else re.escape(p) for p in _gaps(words)))


def _gaps(words: str) -> list[str]:
    return re.split(r"(<\w+>|\.\.\.)", words)


def test_every_place_that_raises_is_listed() -> None:
    """Counted in the text, not in the tree: nothing with words of its own is missing."""
    classes = "|".join(messages.CLASSES)
    raising = re.compile(rf"raise (?:{classes})\(\s*f?\"")
    counts = {
        str(file.relative_to(messages.SOURCES)): len(raising.findall(file.read_text()))
        for file in messages.SOURCES.rglob("*.py")
    }
    told = Counter(message.place.partition(":")[0] for message in messages.messages())
    assert sum(counts.values()) > 300
    assert {file: count for file, count in counts.items() if count > told[file]} == {}


def test_every_class_of_errors_has_its_section() -> None:
    titles = re.findall(r"^## (\w+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert sorted(titles) == sorted(messages.CLASSES)
    for name in messages.CLASSES:
        assert where_to_read(getattr(errors, name)("")) == f"docs/troubleshooting.md#{name.lower()}"
    assert where_to_read(DamagedError("")) == "docs/troubleshooting.md#checkpointerror"


def test_what_no_kind_of_model_can_is_refused_in_a_test() -> None:
    table = compatibility.support()
    assert all(entry != compatibility.UNTRIED for row in table.values() for entry in row.values())
    assert table["LoRA"]["vLLM"] == "GPT, experts" and table["CanonicalAdapter"]["merges into"] == compatibility.NO


def test_layouts_say_what_is_refused() -> None:
    assert compatibility.refused("pp2", "T5") and compatibility.refused("ep2", "GPT")
    assert not compatibility.refused("tp2_sp_ep2", "experts") and compatibility.refused("tp2", "experts")
