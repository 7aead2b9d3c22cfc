"""The mapping algebra against element-by-element definitions, and against megatron-core's own parameters."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from graftwork.errors import ConfigError, MatchError
from graftwork.models import shapes
from graftwork.models.weights import Mapping, Rule, mapping_for, read_config, shape_from_hf
from graftwork.models.weights.load import base_parameters, open_checkpoint, read
from graftwork.models.weights.ops import QKV, Copy, Fused, Gated, Op, Transposed, Whole
from graftwork.models.weights.writer import Entry, write_sharded
from graftwork.parallel.sharding import Sharding, Source
from tests.helpers.core import build
from tests.helpers.tiny_hf import FAMILIES, make_tiny

HIDDEN = 6
OPS: dict[str, Op] = {
    "copy": Copy(Sharding((8, HIDDEN), dim=0)),
    "copy_columns": Copy(Sharding((HIDDEN, 8), dim=1)),
    "replicated": Copy(Sharding((8,))),
    "vocabulary": Copy(Sharding((7, HIDDEN), dim=0, padded=8)),
    "gated": Gated(8, (HIDDEN,)),
    "gated_bias": Gated(8, ()),
    "qkv": QKV(heads=8, groups=4, channels=2, tail=(HIDDEN,)),
    "qkv_bias": QKV(heads=8, groups=4, channels=2, tail=()),
    "c_attn": Transposed(Fused(QKV(heads=4, groups=4, channels=2, tail=(HIDDEN,)))),
    "c_attn_bias": Fused(QKV(heads=4, groups=4, channels=2, tail=())),
    "gate_up_proj": Fused(Gated(8, (HIDDEN,))),
    "c_proj": Transposed(Copy(Sharding((HIDDEN, 8), dim=1))),
    "expert": Whole(Gated(8, (HIDDEN,))),
}


class Spy:
    """A source that counts the elements it hands out."""

    def __init__(self, source: Source) -> None:
        self.source, self.elements = source, 0

    def get_shape(self) -> list[int]:
        return self.source.get_shape()

    def __getitem__(self, index) -> torch.Tensor:
        part = self.source[index]
        self.elements += part.numel()
        return part


@pytest.fixture(params=OPS)
def op(request) -> Op:
    return OPS[request.param]


@pytest.fixture
def tensors(op: Op) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in op.shapes]


@pytest.fixture
def sources(tensors: list[torch.Tensor], tmp_path: Path):
    save_file({str(i): t for i, t in enumerate(tensors)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        yield [Spy(file.get_slice(str(i))) for i in range(len(tensors))]


def test_write_is_the_inverse_of_read(op: Op, tensors, sources) -> None:
    full = op.sharding.join([op.read(sources, 0, 1)])
    assert tuple(full.shape) == op.sharding.shape
    for written, original in zip(op.write(full), tensors):
        assert torch.equal(written, original)


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_reads_its_part_and_nothing_else(op: Op, sources, size: int) -> None:
    full = op.sharding.join([op.read(sources, 0, 1)])
    for rank in range(size):
        for spy in sources:
            spy.elements = 0
        part = op.read(sources, rank, size)
        assert torch.equal(part, op.sharding.take(full, rank, size))
        held = full.numel()
        if op.sharding.dim is not None:
            row = full.numel() // full.shape[op.sharding.dim]
            held = row * sum(s.stop - s.start for s in op.sharding.slices(rank, size))
        assert sum(spy.elements for spy in sources) == held


@pytest.mark.fault(
    "q, k and v are laid out wrongly under grouped queries",
    "each row of the fused weight is compared with its source",
)
def test_qkv_layout_row_by_row() -> None:
    heads, groups, channels = 6, 2, 4
    op = QKV(heads, groups, channels, (HIDDEN,))
    q, k, v = (torch.randn(shape) for shape in op.shapes)
    fused, row = op.read([_Memory(t) for t in (q, k, v)], 0, 1), 0
    for group in range(groups):
        for head in range(heads // groups):
            for channel in range(channels):
                assert torch.equal(fused[row], q[(group * (heads // groups) + head) * channels + channel])
                row += 1
        for part in (k, v):
            for channel in range(channels):
                assert torch.equal(fused[row], part[group * channels + channel])
                row += 1
    assert row == len(fused)


class _Memory:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index) -> torch.Tensor:
        return self.tensor[index]


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_cover_exactly_the_parameters_and_the_tensors(family: str, tmp_path: Path) -> None:
    directory = make_tiny(family, tmp_path / "hf")
    shape = shape_from_hf(read_config(directory))
    mapping = mapping_for(shape)
    parameters = dict(base_parameters(build(shape)))
    assert {rule.core for rule in mapping.expanded() if not rule.alias} == parameters.keys()
    for name, parameter in parameters.items():
        assert mapping.rule(name).op.sharding.local_shape(1) == tuple(parameter.shape), name
    with open_checkpoint(mapping, directory) as files:
        assert files.files.keys() == mapping.hf_shapes().keys()
    assert sum(torch.Size(s).numel() for s in mapping.hf_shapes().values()) == shape.total_parameters()


@pytest.mark.parametrize("size", [1, 2])
def test_bytes_read_by_two_ranks_are_the_file_once_plus_what_is_replicated(size: int, tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    shape = shape_from_hf(read_config(directory))
    mapping = mapping_for(shape, tensor_parallel=size)
    replicated = shape.hidden_size * (2 * shape.num_layers + 1)
    with open_checkpoint(mapping, directory) as files:
        spies: list[Spy] = []
        source = files.source
        files.source = lambda name: spies.append(Spy(source(name))) or spies[-1]  # type: ignore[method-assign]
        for rank in range(size):
            for rule in mapping.expanded():
                read(rule, files, rank, size)
    assert sum(spy.elements for spy in spies) == shape.total_parameters() + (size - 1) * replicated


@pytest.mark.parametrize("name", ["llama2_70b", "gpt3_175b", "nemotron4_340b", "qwen3_30b_a3b"])
def test_big_models_are_mapped_without_building_them(name: str) -> None:
    shape = getattr(shapes, name)()
    mapping = mapping_for(shape, tensor_parallel=8)
    total = sum(torch.Size(rule.op.sharding.shape).numel() for rule in mapping.expanded() if not rule.alias)
    assert total == shape.total_parameters()
    if shape.num_moe_experts is not None:
        expert = mapping.rule("decoder.layers.47.mlp.experts.local_experts.127.linear_fc2.weight")
        assert expert.hf == ("model.layers.47.mlp.experts.127.down_proj.weight",)
        assert expert.op.sharding.local_shape(8) == (shape.hidden_size, shape.expert_width)
        return
    fc2 = mapping.rule("decoder.layers.79.mlp.linear_fc2.weight").op.sharding
    assert fc2.local_shape(8)[1] == shape.ffn_hidden_size // 8


def test_names() -> None:
    mapping = mapping_for(shapes.llama2_7b(num_layers=2), tensor_parallel=1)
    assert mapping.rule("decoder.layers.1.mlp.linear_fc1.weight").hf == (
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )
    with pytest.raises(MatchError, match="no llama parameter is called 'decoder.layers.1.mlp.linear_fc3.weight'"):
        mapping.rule("decoder.layers.1.mlp.linear_fc3.weight")
    with pytest.raises(MatchError):
        mapping.rule("decoder.layers.2.mlp.linear_fc1.weight")


def test_two_stacks_have_layers_of_their_own() -> None:
    op = OPS["replicated"]
    patterns = ("encoder.layers.{layer}.a", "encoder.layers.{layer}.b", "encoder.norm", "decoder.layers.{layer}.a")
    rules = tuple(Rule(core, (f"hf.{core}",), op) for core in patterns)
    mapping = Mapping("t5", {"encoder": 2, "decoder": 3}, rules)
    assert [rule.core for rule in mapping.expanded()] == [
        *("encoder.layers.0.a", "encoder.layers.0.b", "encoder.layers.1.a", "encoder.layers.1.b", "encoder.norm"),
        *(f"decoder.layers.{layer}.a" for layer in range(3)),
    ]
    assert mapping.rule("decoder.layers.2.a").hf == ("hf.decoder.layers.2.a",)
    for unknown in ("encoder.layers.2.a", "decoder.layers.3.a", "decoder.layers.0.b"):
        with pytest.raises(MatchError, match=f"no t5 parameter is called '{unknown}'"):
            mapping.rule(unknown)


def test_experts_belong_to_their_families() -> None:
    with pytest.raises(
        ConfigError, match="no Hugging Face llama model has num_moe_experts=4; None is valid, or .*'mix"
    ):
        mapping_for(shapes.llama2_7b(num_moe_experts=4))
    with pytest.raises(ConfigError, match="no Hugging Face mixtral model has num_moe_experts=None; a number is valid"):
        mapping_for(shapes.llama2_7b(family="mixtral"))


def test_writing_keeps_one_tensor_in_memory(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def tensors():
        nonlocal most
        for _ in range(10):
            tensor = torch.randn(4)
            alive.add(tensor)
            most = max(most, len(alive))
            yield tensor
            del tensor

    write_sharded(tmp_path, [Entry(str(i), (4,), torch.float32) for i in range(10)], tensors(), 10**6)
    assert most <= 2
