"""Cuts of every linear: factors and vectors join to the full tensors, norms are those of the dense weight."""

from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork import parallel
from graftwork.models import GPT
from graftwork.parallel.sharding import Sharding
from graftwork.peft.cuts import ColumnCut, Cut, Region, Replicated, RowCut, cut_of, is_linear
from graftwork.peft.sites import Host, Place, Site
from tests.contracts.methods import shape
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of

KINDS = {
    "linear_qkv": ColumnCut,
    "linear_fc1": ColumnCut,
    "output_layer": ColumnCut,
    "linear_proj": RowCut,
    "linear_fc2": RowCut,
}
Found = dict[str, tuple[Cut, Tensor, Tensor]]


def host(**sizes: Any) -> Host:
    model = GPT(shape(**sizes), dtype="fp32")
    model.configure_model()
    return model.stack.host


def cuts(found: Host) -> Found:
    """Return the cut, weight and norms of every linear."""
    sites = [s for s in found.sites() if is_linear(s.module)]
    weights = {s.name: s.module.weight.detach().clone() for s in sites}
    read = {s.name: cut_of(s, found) for s in sites}
    return {name: (cut, weights[name], cut.norm(weights[name])) for name, cut in read.items()}


def on_ranks(rank: int, world: int) -> Found:
    parallel.initialize(layout_of(tensor=world))
    return cuts(host())


@pytest.mark.processes
def test_norms_over_two_ranks_are_those_of_the_dense_weight() -> None:
    alone = cuts(host())
    parallel.destroy()
    ranks = run_ranks(on_ranks, 2)
    for name, (cut, dense, _) in alone.items():
        assert type(cut) is KINDS[name.rpartition(".")[2]]
        wanted = dense.square().sum(1).sqrt()
        other, _, _ = ranks[0][name]
        assert (other.inputs, other.outputs) == (cut.inputs, cut.outputs)
        norms, weights = ([rank[name][part] for rank in ranks] for part in (2, 1))
        whole = other.output_vector().join(norms)
        assert torch.allclose(whole, wanted[: len(whole)], rtol=1e-6), name
        # the low-rank update's factors are cut as the weight is
        out, into = other.output_factor(cut.inputs), other.input_factor(cut.outputs)
        cut_side: Sharding = out if other.output_vector().dim is not None else into
        assert torch.equal(cut_side.join(weights), dense[: cut.outputs]), name
    assert all(
        torch.equal(first, second) for first, second in zip(*(r["decoder.layers.0.mlp.linear_fc2"][2:] for r in ranks))
    )


def test_one_rank_alone_has_other_norms() -> None:
    """Deliberate break: without the sum over ranks a cut row's norm is too small."""
    row = RowCut(48, 32, Region(1))
    weight = torch.randn(32, 48)
    assert not torch.allclose(row.norm(weight[:, :24]), row.norm(weight))
    assert torch.equal(row.norm(weight), Replicated(48, 32, Region(1)).norm(weight))


@pytest.mark.parametrize(
    ("cut", "partial", "differ"),
    [
        (ColumnCut(8, 8, Region(2)), (False, False), (False, True)),
        (ColumnCut(8, 8, Region(2, True)), (True, False), (True, True)),
        (RowCut(8, 8, Region(2)), (False, False), (True, False)),
        (RowCut(8, 8, Region(2, True)), (False, True), (True, True)),
        (Replicated(8, 8, Region(2)), (False, False), (False, False)),
        (Replicated(8, 8, Region(2, True)), (True, True), (True, True)),
        (Replicated(8, 8, Region(1)), (False, False), (False, False)),
    ],
    ids=str,
)
def test_who_sees_a_part(cut: Cut, partial: tuple[bool, bool], differ: tuple[bool, bool]) -> None:
    assert (cut.input_partial, cut.output_partial) == partial
    assert (cut.inputs_differ, cut.outputs_differ) == differ


def test_an_expert_is_replicated() -> None:
    found = host(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16)
    cut = {s.name: cut_of(s, found) for s in found.sites() if is_linear(s.module)}
    name = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2"
    assert type(cut[name]) is Replicated and cut[name].region == Region(1)


@pytest.mark.parametrize(
    ("name", "part", "layer", "inside"),
    [
        ("decoder.layers.10.mlp.linear_fc1", "decoder", 10, "mlp.linear_fc1"),
        ("encoder.layers.0.self_attention", "encoder", 0, "self_attention"),
        ("decoder.layers.0", "decoder", 0, None),
        ("decoder.layers", None, None, None),
        ("embedding.word_embeddings", None, None, None),
    ],
)
def test_a_place_knows_its_part_and_layer(name: str, part: str | None, layer: int | None, inside: str | None) -> None:
    place = Place(name)
    assert (place.part, place.layer, place.inside) == (part, layer, inside)


def test_layers_are_selected_in_each_part() -> None:
    names = [f"{part}.layers.{i}.mlp" for part in ("encoder", "decoder") for i in range(3)]
    sites = [Site(name, name, torch.nn.Identity()) for name in names]
    parallel.ensure_initialized()
    found = Host([], None, 1, 1, depths={"encoder": 3, "decoder": 3})  # type: ignore[arg-type]

    def selected(layers: Any) -> list[str]:
        return [s.name.replace(".layers.", "").removesuffix(".mlp") for s in found.select(sites, ["mlp"], layers, "X")]

    assert selected([1]) == ["encoder1", "decoder1"]
    assert selected({"decoder": [0, 2]}) == ["decoder0", "decoder2"]
    assert selected({"encoder": [2], "decoder": [0]}) == ["encoder2", "decoder0"]
    with pytest.raises(ValueError, match="layers has 3, but the model's layers are 0 to 2"):
        selected({"decoder": [3]})
    with pytest.raises(ValueError, match="layers names 'decodr'; did you mean 'decoder'"):
        selected({"decodr": [0]})
