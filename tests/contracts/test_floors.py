"""What an import costs and what the source may not contain; the floors themselves are import-linter's contract."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "graftwork").rglob("*.py"))
CONFIG_LIBRARIES = {"nemo_run", "fiddle"}
HEAVY = {"torch", "lightning", "megatron", "transformers", "datasets", "numpy", *CONFIG_LIBRARIES}


def loaded(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_the_package_alone_imports_nothing_heavy() -> None:
    assert not loaded("import graftwork, graftwork.errors, graftwork.virtual_tokens, graftwork.atomic") & HEAVY


def test_library_floors_work_without_config_libraries() -> None:
    modules = loaded("import graftwork.peft, graftwork.models, graftwork.data, graftwork.training, graftwork.inference")
    assert "megatron" in modules and not modules & CONFIG_LIBRARIES


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_small_and_its_annotations_are_types(source: Path) -> None:
    text = source.read_text()
    assert text.count("\n") <= 300
    assert "from __future__ import annotations" not in text, "NeMo Run's overrides need annotations that are types"
    assert not re.search(r"except\s*:|except (Base)?Exception\b(?! as error:\n(.*\n){1,8}?\s+raise)", text)
    assert not re.search(r"\bTODO\b|\bFIXME\b|NotImplementedError", text)
