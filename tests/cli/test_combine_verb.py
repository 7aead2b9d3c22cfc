"""``nemorun graft combine``: several adapter directories and weights, on the real command line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftwork import models
from graftwork.cli.combine import combine
from graftwork.cli.context import GraftContext
from graftwork.errors import ConfigError
from graftwork.peft import LoRA
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import make_tiny

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory with a base and two adapters."""
    for name in "ab":
        model = models.load(make_tiny("llama", tmp_path / "base"))
        model.add_adapter(LoRA(name, dim=2, alpha=4))
        shake(model, 0.1)
        model.save_adapters(tmp_path / name)
    return tmp_path


def verb(place: Path, *words: str) -> None:
    adapters = f"adapters=['{place / 'a'}','{place / 'b'}']"
    GraftContext(name="combine", skip_confirmation=True).cli_execute(combine, [adapters, *words])


@pytest.mark.parametrize("weights", ["[0.7,-0.3]", "[1,-1]"])
def test_an_adapter_of_two(weights: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb(place, f"weights={weights}", "combine=svd", "rank=3", "name=both", f"output={place / 'both'}")
    assert f"wrote {place / 'both'}" in capsys.readouterr().out
    shapes = {key.rpartition(".")[2]: t.shape for key, t in load_file(place / "both" / TENSORS).items()}
    assert shapes["lora_A"][0] == shapes["lora_B"][1] == 3


def test_a_merged_model_of_two(place: Path) -> None:
    words = "weights=[0.5,0.5]", f"output={place / 'merged'}", f"base={place / 'base'}"
    verb(place, *words, "merged=True", "dtype=bf16")
    held = load_file(place / "merged" / "model.safetensors")
    assert {t.dtype for t in held.values()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="dtype='bf16' counts only with merged=True"):
        combine([str(place / "a")], [1.0], str(place / "other"), dtype="bf16")
    assert not (place / "other").exists()
