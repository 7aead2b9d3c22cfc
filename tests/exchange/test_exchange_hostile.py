"""Whatever stands in a Hugging Face adapter's files: it loads, or one sentence says why not and nothing is left."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from graftwork.errors import CheckpointError, GraftworkError
from graftwork.models.exchange import piece
from graftwork.models.exchange.fields import KNOWN
from graftwork.peft import LoRA
from tests.exchange.desk import Desk
from tests.exchange.test_peft_in import CONFIG, TENSORS, config_of

STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 1.5, 10**30, 1e300, "", "x", "(a+)+$", "\ud800", [], [1], ["x"], [["x"]], {}),
    *(
        {"x": 1},
        {"x": "y"},
        {"(": 2},
        {"q_proj": 0},
        {"q_proj": None},
        ["q_proj", 3],
        "all-linear",
        "LoRA",
        [True],
        [-1],
    ),
]
ROUNDS = 60


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk("llama", tmp_path_factory.mktemp("llama") / "hf")


def attempt(desk: Desk, path: Path) -> str:
    model = desk.clear()
    try:
        model.load_adapters(path)
    except GraftworkError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500 and not model.adapters
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["some", "ia3", "prompt", "ptuning"])
def test_any_value_in_any_field(kind: str, llama: Desk, tmp_path: Path) -> None:
    llama.made(config_of(kind, "llama"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / CONFIG).read_text())
    fields, refused = sorted({*config, *KNOWN[config["peft_type"]], "of_the_future"}), 0
    for field in fields:
        for value in random.Random(field).sample(STRANGE, 8):
            (tmp_path / "hf" / CONFIG).write_text(json.dumps({**config, field: value}))
            refused += bool(attempt(llama, tmp_path / "hf"))
    assert refused > len(fields)


def test_any_byte_in_the_tensors(llama: Desk, tmp_path: Path) -> None:
    llama.made(config_of("some", "llama"), tmp_path / "hf")
    whole, drawn, refused = (tmp_path / "hf" / TENSORS).read_bytes(), random.Random(5), 0
    for _ in range(ROUNDS):
        data = bytearray(whole)
        for _ in range(drawn.choice((1, 1, 4, 64))):
            data[drawn.randrange(drawn.choice((200, 4000, len(data))))] = drawn.randrange(256)
        if drawn.random() < 0.3:
            del data[drawn.randrange(len(data)) :]
        (tmp_path / "hf" / TENSORS).write_bytes(data)
        refused += bool(attempt(llama, tmp_path / "hf"))
    assert refused > ROUNDS // 3


def test_a_full_disk_keeps_the_previous_export(llama: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama.grafted(LoRA(dim=4))
    model.export_adapters(tmp_path / "out")
    before = load_file(tmp_path / "out" / TENSORS)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(piece, "write_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        model.export_adapters(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert load_file(tmp_path / "out" / TENSORS).keys() == before.keys()
