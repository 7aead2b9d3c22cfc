"""Fixtures of the data tests: a real tiny tokenizer, a cache of their own, files made on the spot."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Pad id is the EOS id: the trap."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def bos_tokenizer(tmp_path_factory):
    """Adds ``<s>`` itself, and its chat template writes it too, as Llama 3's does."""
    template = "{{ bos_token }}" + tiny_tokenizer(tmp_path_factory.mktemp("plain")).chat_template
    return tiny_tokenizer(tmp_path_factory.mktemp("bos"), chat_template=template, adds_bos=True, pad_is_eos=False)


@pytest.fixture
def write(tmp_path):
    """``write(name, rows)``: a data file of the kind that the name's suffix says; returns its path."""

    def make(name: str, rows) -> str:
        path = tmp_path / name
        if isinstance(rows, str | bytes):
            path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif path.suffix in (".csv", ".tsv"):
            _write_csv(path, rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def _write_csv(path: Path, rows) -> None:
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        out.writeheader()
        out.writerows(rows)
