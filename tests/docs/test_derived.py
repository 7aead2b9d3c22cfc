"""Tables that follow from the registries say what is in them."""

from pathlib import Path

import pytest

from tests.helpers.derived import BLOCKS, blocks, faults, names, pages, text
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
