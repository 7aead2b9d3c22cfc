"""Damaged base checkpoints: one short sentence, or exactly the weights and the function that the files describe."""

import json
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graftwork.errors import CheckpointError
from graftwork.models.weights import check_checkpoint, export_weights, mapping_for, read_config, shape_from_hf
from graftwork.models.weights.files import TensorFiles
from graftwork.models.weights.load import base_parameters
from tests.fuzz.mutations import Mutation, damage, draw
from tests.helpers.core import loaded, logits
from tests.helpers.tiny_hf import make_tiny

SMALL = {"llama": {"num_hidden_layers": 1}, "llama_tied": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}}
SECONDS, KIBIBYTES, CHARACTERS = 10.0, 400_000, 500
TOLERANCE = 5e-5
FINDINGS = ("json.text#59",)
"""What once came out as something else than a sentence: a shard named by half of a surrogate pair."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """Whole checkpoints: a single file of two families, and a directory with an index."""
    root = tmp_path_factory.mktemp("whole")
    made = [make_tiny(family, root / family, **sizes) for family, sizes in SMALL.items()]
    module, shape = loaded(made[0])
    export_weights(module, shape, root / "sharded", source=made[0], shard_bytes=50_000)
    return [*made, root / "sharded"]


def outcome(directory: Path, whole: Path) -> str:
    """Tell what became of a damaged checkpoint: ``refused``, or ``equal`` to what its files say."""
    try:
        shape = shape_from_hf(read_config(directory))
        check_checkpoint(shape, directory)
        module, _ = loaded(directory)
    except CheckpointError as error:
        text = str(error)
        assert "\n" not in text and len(text) < CHARACTERS, f"{len(text)} characters: {text[:1000]}"
        return "refused"
    mapping, parameters = mapping_for(shape), dict(base_parameters(module))
    with TensorFiles(directory, mapping.canonical) as files:
        stored = {name: load_file(file)[files.stored_name(name)] for name, file in files.files.items()}
    for rule in mapping.expanded():
        if rule.core in parameters:
            for name, tensor in zip(rule.hf, rule.op.write(parameters[rule.core].detach())):
                rows = stored[name].shape[0]
                assert torch.equal(tensor[:rows], stored[name].float()), f"{name} is not what the file holds"
    if (directory / "config.json").read_bytes() != (whole / "config.json").read_bytes():
        assert_same_function(directory, module)
    return "equal"


def assert_same_function(directory: Path, module: torch.nn.Module) -> None:
    """Compare logits with transformers, where it takes the changed configuration too."""
    tokens = torch.arange(3, 40)[None]
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    except Exception:  # noqa: BLE001  # transformers is stricter in fields that we do not read
        return
    with torch.no_grad():
        theirs = model(tokens).logits
    ours = logits(module, tokens)[..., : theirs.shape[-1]]
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), "another function than transformers'"


def run(mutations: list[Mutation], checkpoints: list[Path], work: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, mutation in enumerate(mutations):
        whole, damaged = checkpoints[number % len(checkpoints)], work / "damaged"
        shutil.copytree(whole, damaged)
        started = time.process_time()
        try:
            if damage(damaged, mutation) is not None:
                found[outcome(damaged, whole)] += 1
        except Exception as error:  # whatever it is, say what caused it
            raise AssertionError(f"{mutation} on {whole.name}: {type(error).__name__}: {str(error)[:600]}") from error
        finally:
            shutil.rmtree(damaged, ignore_errors=True)
            for path in work.iterdir():  # a directory mutation may move things outside
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        assert time.process_time() - started < SECONDS, f"{mutation} on {whole.name} took too long"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < KIBIBYTES
    return found


def test_past_findings(checkpoints: list[Path], tmp_path: Path) -> None:
    found = run([Mutation.parse(text) for text in FINDINGS for _ in checkpoints], checkpoints, tmp_path)
    assert sum(found.values()) == len(FINDINGS) * len(checkpoints)


def test_300_damaged_checkpoints(checkpoints: list[Path], tmp_path: Path) -> None:
    found = run(draw(300), checkpoints, tmp_path)
    print(json.dumps(found))
    assert found["refused"] > 150 and found["equal"] > 20


@pytest.mark.slow
def test_5000_damaged_checkpoints(checkpoints: list[Path], tmp_path: Path) -> None:
    found = run(draw(5300)[300:], checkpoints, tmp_path)
    print(json.dumps(found))
    assert found["refused"] > 2500 and found["equal"] > 300
