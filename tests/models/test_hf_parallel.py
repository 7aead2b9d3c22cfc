"""Loading and exporting at TP2, PP2 and both give one process's logits and the same bytes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from graftwork import parallel
from graftwork.errors import CheckpointError
from graftwork.models.weights import export_weights, load_weights, mapping_for, read_config, shape_from_hf
from graftwork.models.weights.load import base_parameters
from tests.helpers.core import build, loaded, logits
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.tiny_hf import ODD_VOCABULARY, make_tiny

FAMILIES = ["llama", "llama_tied", "gpt2", "nemotron", "qwen3", "phi3"]
LAYOUTS = [(2, 1), (1, 2), (2, 2)]


def tokens() -> torch.Tensor:
    return torch.randint(ODD_VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def full_logits(module: torch.nn.Module, hidden: int) -> torch.Tensor | None:
    """Run all stages; logits [b, s, padded vocab] on the last stage, None elsewhere."""
    batch = tokens()
    if not parallel.is_first_stage():
        received = torch.empty(batch.shape[1], batch.shape[0], hidden)
        dist.recv(received, src=dist.get_global_rank(parallel.pp_group(), parallel.pp_rank() - 1))
        module.set_input_tensor(received)
    output = logits(module, batch)
    if not parallel.is_last_stage():
        dist.send(output.contiguous(), dst=dist.get_global_rank(parallel.pp_group(), parallel.pp_rank() + 1))
        return None
    parts = [torch.empty_like(output) for _ in range(parallel.tp_size())]
    dist.all_gather(parts, output.contiguous(), group=parallel.tp_group())
    return torch.cat(parts, dim=-1)


def load_and_export(rank: int, world: int, tensor: int, pipeline: int, sources: list[Path], target: Path) -> list:
    parallel.initialize(layout_of(tensor=tensor, pipeline=pipeline))
    results = []
    for source in sources:
        module, shape = loaded(source)
        mapping = mapping_for(shape)
        for name, parameter in base_parameters(module):
            assert mapping.rule(name).op.sharding.local_shape(tensor) == tuple(parameter.shape), name
        results.append(full_logits(module, shape.hidden_size))
        export_weights(module, shape, target / source.name)
    return results


@pytest.mark.processes
@pytest.mark.parametrize("tensor, pipeline", LAYOUTS)
def test_layouts_agree_with_one_process(tensor: int, pipeline: int, tmp_path: Path) -> None:
    sources = [make_tiny(family, tmp_path / family) for family in FAMILIES]
    results = run_ranks(load_and_export, tensor * pipeline, tensor, pipeline, sources, tmp_path / "out")
    for index, source in enumerate(sources):
        module, _ = loaded(source)
        expected = logits(module, tokens())
        (found, *_) = [ranks[index] for ranks in results if ranks[index] is not None]
        difference = (found[..., :ODD_VOCABULARY] - expected).abs().max() / expected.abs().max()
        assert difference < 5e-6, source.name
        before = load_file(source / "model.safetensors")
        after = load_file(tmp_path / "out" / source.name / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), source.name


def load_and_export_virtual_stages(rank: int, world: int, source: Path, target: Path) -> list[str]:
    parallel.initialize(layout_of(pipeline=2, virtual_pipeline=2))
    shape = shape_from_hf(read_config(source))
    stages = [build(shape, vp=vp) for vp in (0, 1)]
    load_weights(stages, shape, source)
    export_weights(stages, shape, target)
    return [name for name, _ in base_parameters(stages) if name.endswith("linear_proj.weight")]


@pytest.mark.processes
def test_virtual_stages_hold_their_own_layers(tmp_path: Path) -> None:
    source = make_tiny("llama_tied", tmp_path / "hf")
    names = run_ranks(load_and_export_virtual_stages, 2, source, tmp_path / "out")
    held = [[int(name.split(".")[2]) for name in rank] for rank in names]
    assert held == [[0, 2], [1, 3]]
    before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def export_to_a_bad_place(rank: int, world: int, source: Path, target: Path) -> str:
    parallel.initialize(layout_of(tensor=2))
    module, shape = loaded(source, torch.bfloat16)
    with pytest.raises(CheckpointError) as caught:
        export_weights(module, shape, target)
    export_weights(module, shape, target.parent.with_name("good"))
    return str(caught.value)


@pytest.mark.processes
def test_failed_export_fails_on_every_rank_and_hangs_none(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "hf", dtype="bfloat16")
    (tmp_path / "file").write_text("")
    messages = run_ranks(export_to_a_bad_place, 2, source, tmp_path / "file" / "out")
    assert all("cannot be written" in message for message in messages)
    good = load_file(tmp_path / "good" / "model.safetensors")
    before = load_file(source / "model.safetensors")
    assert all(torch.equal(before[name], good[name]) for name in before)
