"""New methods without touching a file: one that wraps and reads the base's weights, one that trains the base's own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from graftwork import parallel
from graftwork.errors import ArtifactError, MatchError
from graftwork.models import GPT
from graftwork.optim import AdamW
from graftwork.parallel.record import record_of
from graftwork.peft import METHODS, PEFT, LoRA, report
from graftwork.peft.adapter import Adapter, Birth, Inner
from graftwork.peft.cuts import Cut, cut_of
from graftwork.peft.sites import BaseTensor, Host, Site
from tests.contracts.methods import adapter_parameters, base_values, loss, make, same, shake, shape, tiny, tokens
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of

TENSORS = "adapter_model.safetensors"


class Rescaled(Adapter):
    """``y = (m / |W|) base(x)``: DoRA's magnitude without its direction."""

    mergeable = True
    magnitude: nn.Parameter

    def __init__(self, birth: Birth, base: nn.Module, cut: Cut) -> None:
        super().__init__(birth)
        self.__dict__["base"] = base
        self.cut = cut
        self.derive_parameter("magnitude", cut.output_vector(), self.norms, partial=cut.output_partial)

    def norms(self) -> Tensor:
        """Return the norm of every row of the base's weight."""
        return self.cut.norm(self.base.weight)

    def forward(self, inner: Inner, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Scale the linear's output, not its bias."""
        output, bias = inner(*args, **kwargs)
        return output * (self.magnitude / self.norms()).to(output.dtype), bias

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale the rows."""
        return weight * (self.magnitude / self.norms())[:, None], bias


class ToyMagnitude(PEFT):
    """A learned magnitude on every MLP linear."""

    default_lr = 1e-2

    def __init__(self, name: str = "toy_magnitude", layers: Optional[list[int]] = None) -> None:
        super().__init__(name, layers)

    def find(self, host: Host) -> list[Site]:
        """Return the two linears of each MLP."""
        return host.select(host.sites(), ["linear_fc1", "linear_fc2"], self.layers, str(self))

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build the magnitude of one linear."""
        return Rescaled(birth, site.module, cut_of(site, host))


class ToyBitFit(PEFT):
    """Trains the biases of the linears (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    default_lr = 1e-2

    def __init__(self, name: str = "toy_bitfit", layers: Optional[list[int]] = None) -> None:
        super().__init__(name, layers)

    def find(self, host: Host) -> list[Site]:
        """Return nothing: no module is wrapped."""
        return []

    def selects(self, host: Host) -> list[BaseTensor]:
        """Return the biases."""
        return host.select(host.tensors(), ["bias"], self.layers, str(self))


@pytest.fixture(autouse=True)
def entered() -> Iterator[None]:
    """Both are in the registry, and out of it again."""
    for method in (ToyMagnitude, ToyBitFit):
        METHODS.enter(method.__name__, method)
    yield
    for method in (ToyMagnitude, ToyBitFit):
        METHODS.withdraw(method.__name__)


def family_of(method: type[PEFT]) -> str:
    return "gpt2" if method is ToyBitFit else "llama"


every_toy = pytest.mark.parametrize("method", [ToyMagnitude, ToyBitFit])


def adapted(method: type[PEFT], **options: Any) -> GPT:
    model = make(family_of(method), **options)
    model.add_adapter(tiny(METHODS[method.__name__]))
    return model


def trained(model: GPT, steps: int = 3) -> list[float]:
    """Train a few steps; return the losses."""
    optimizer, _ = AdamW(lr=1e-2, schedule="constant").build(model, steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        step = loss(model)
        step.backward()
        optimizer.step()
        losses.append(float(step.detach()))
    return losses


def logits(model: GPT) -> Tensor:
    with torch.no_grad():
        return model(tokens())


@every_toy
def test_the_registry_is_all_that_knows_it(method: type[PEFT]) -> None:
    assert METHODS[method.__name__] is method
    assert method.short_name() == method().name == {"ToyMagnitude": "toy_magnitude"}.get(method.__name__, "toy_bitfit")


@every_toy
def test_it_is_the_identity_at_birth_and_keeps_the_bases_names(method: type[PEFT]) -> None:
    model = make(family_of(method))
    base, names, state = logits(model), list(dict(model.named_parameters())), base_values(model)
    model.add_adapter(tiny(method))
    assert torch.equal(logits(model), base)
    after = dict(model.named_parameters())
    assert [n for n in after if ".adapters." not in n] == names
    assert all(torch.equal(after[n], value) for n, value in state.items())


@every_toy
def test_only_it_trains(method: type[PEFT]) -> None:
    model = adapted(method)
    before, owned = base_values(model), {n: p.detach().clone() for n, p in adapter_parameters(model)}
    assert all(p.requires_grad == (n in owned) for n, p in model.named_parameters())
    losses = trained(model)
    assert losses[-1] < losses[0] and same(base_values(model), before)
    moved = {n: p for n, p in adapter_parameters(model) if not torch.equal(p, owned[n])}
    assert moved.keys() == owned.keys()


@every_toy
def test_saved_loaded_deleted(method: type[PEFT], tmp_path: Path) -> None:
    model = adapted(method)
    trained(model)
    model.save_adapters(tmp_path / "adapter")
    twin = make(family_of(method))
    base, flags = logits(twin), {n: p.requires_grad for n, p in twin.named_parameters()}
    original = base_values(twin)
    twin.load_adapters(tmp_path / "adapter")
    assert torch.equal(logits(twin), logits(model)) and not torch.equal(logits(twin), base)
    assert same(dict(adapter_parameters(twin)), dict(adapter_parameters(model)))
    twin.delete_adapter(method.short_name())
    assert torch.equal(logits(twin), base) and same(base_values(twin), original)
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == flags


@every_toy
def test_switched_off_in_a_stack_and_merged(method: type[PEFT]) -> None:
    model = make(family_of(method))
    base = logits(model)
    model.add_adapter([LoRA(dim=4), tiny(method)])
    shake(model, 0.05)
    live = logits(model)
    with model.adapters_disabled():
        assert torch.equal(logits(model), base)
        with model.adapters_disabled():
            assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), live)
    model.merge_adapters()
    assert (logits(model) - live).abs().max() <= 1e-5 * live.abs().max()
    with model.adapters_disabled():
        assert torch.equal(logits(model), base)
    model.unmerge_adapters()
    assert torch.equal(logits(model), live)
    model.delete_adapter(method.short_name())
    model.delete_adapter("lora")
    assert torch.equal(logits(model), base)


@every_toy
def test_it_is_frozen_when_another_trains(method: type[PEFT]) -> None:
    model = adapted(method)
    model.add_adapter(LoRA(dim=4))
    model.train_adapters(["lora"])
    owners = {record_of(p).owner for p in model.parameters() if p.requires_grad}
    assert owners == {"lora"}
    model.train_adapters([method.short_name()])
    assert {record_of(p).owner for p in model.parameters() if p.requires_grad} == {method.short_name()}


@every_toy
def test_a_report_counts_it(method: type[PEFT]) -> None:
    model = adapted(method)
    rows = report.sites(model.stack)
    assert sum(r.parameters for r in rows) == sum(p.numel() for _, p in adapter_parameters(model))
    assert {r.method for r in rows} == {method.__name__}


def test_a_magnitude_starts_at_the_norms_of_the_base_also_without_memory() -> None:
    model = adapted(ToyMagnitude)
    for item in model.stack.grafted["toy_magnitude"]:
        norms = item.site.module.weight.detach().square().sum(1).sqrt()
        assert torch.allclose(item.adapter.magnitude, norms)
    empty = GPT(shape(), dtype="fp32")
    empty.configure_model()
    empty.module.to_empty(device="meta")
    empty.add_adapter(ToyMagnitude())
    assert all(p.device.type == "meta" for p in empty.parameters())


def on_ranks(rank: int, world: int, path: Path) -> Tensor:
    parallel.initialize(layout_of(tensor=world))
    METHODS.enter(ToyMagnitude.__name__, ToyMagnitude)
    model = GPT(shape(), dtype="fp32")
    model.configure_model()
    model.add_adapter(ToyMagnitude())
    model.save_adapters(path)
    return logits(model)


@pytest.mark.processes
def test_a_magnitude_is_the_same_over_two_ranks(tmp_path: Path) -> None:
    model = GPT(shape(), dtype="fp32")
    model.configure_model()
    base = logits(model)
    model.add_adapter(ToyMagnitude())
    model.save_adapters(tmp_path / "one")
    parallel.destroy()
    for found in run_ranks(on_ranks, 2, tmp_path / "two"):
        assert (found - base).abs().max() <= 1e-5 * base.abs().max()
    one, two = (load_file(tmp_path / name / TENSORS) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(two[k], one[k], rtol=1e-6) for k in one)


def test_trained_tensors_of_the_base_keep_their_global_names(tmp_path: Path) -> None:
    model = adapted(ToyBitFit)
    trained(model)
    model.save_adapters(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    assert len(tensors) == len(dict(adapter_parameters(model)))
    for name, parameter in adapter_parameters(model):
        assert torch.equal(tensors[f"toy_bitfit.{name.removeprefix('module.')}"], parameter)


def test_what_is_saved_is_trained_also_while_something_else_is_shown(tmp_path: Path) -> None:
    """Switched off, the base shows its original values; merged, it shows the adapters' weights too."""
    model = make("gpt2")
    model.add_adapter([LoRA(dim=4), ToyBitFit()])
    shake(model, 0.05)
    model.save_adapters(tmp_path / "live")
    with model.adapters_disabled():
        model.save_adapters(tmp_path / "off")
    model.merge_adapters()
    model.save_adapters(tmp_path / "merged")
    with model.adapters_disabled():
        model.save_adapters(tmp_path / "both")
    files = [(tmp_path / name / TENSORS).read_bytes() for name in ("live", "off", "merged", "both")]
    assert len(set(files)) == 1
    with pytest.raises(ArtifactError, match="merged into the base"):
        model.load_adapters(tmp_path / "live", names=["toy_bitfit"])


def test_loading_into_a_model_that_is_switched_off(tmp_path: Path) -> None:
    model, twin = adapted(ToyBitFit), adapted(ToyBitFit)
    shake(model, 0.05)
    model.save_adapters(tmp_path / "adapter")
    base = logits(twin)
    with twin.adapters_disabled():
        twin.load_adapters(tmp_path / "adapter")
        assert torch.equal(logits(twin), base)
    assert torch.equal(logits(twin), logits(model))


def test_one_tensor_has_one_owner() -> None:
    model = adapted(ToyBitFit)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(MatchError, match=r"ToyBitFit 'again' cannot train .*bias: adapter 'toy_bitfit' does"):
        model.add_adapter([LoRA(dim=4), ToyBitFit("again")])
    assert list(model.adapters) == ["toy_bitfit"]
    assert all(p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    model.delete_adapter("toy_bitfit")
    model.add_adapter(ToyBitFit("again"))
    assert {record_of(p).owner for p in model.parameters()} == {"again", None}


def test_a_failing_stack_gives_the_tensors_back() -> None:
    model = make("gpt2")
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(MatchError, match="'nope'"):
        model.add_adapter([ToyBitFit(), LoRA(target_modules=["nope"])])
    assert all(
        p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) and record_of(p).owner is None
        for n, p in model.named_parameters()
    )


def test_a_merged_weight_cannot_be_lent() -> None:
    class Everything(ToyBitFit):
        """Trains the weights of one linear."""

        def selects(self, host: Host) -> list[BaseTensor]:
            """Return them."""
            return host.select(host.tensors(), ["linear_fc2.weight"], self.layers, str(self))

    model = make()
    model.add_adapter(LoRA(dim=4))
    shake(model, 0.05)
    model.merge_adapters()
    with pytest.raises(MatchError, match="adapters are merged into it; unmerge first"):
        model.add_adapter(Everything())
    model.unmerge_adapters()
    base = logits(model)
    model.add_adapter(Everything())
    shake(model, 0.05, only="toy_bitfit")
    live = logits(model)
    model.merge_adapters()
    assert (logits(model) - live).abs().max() <= 1e-5 * live.abs().max()
    model.unmerge_adapters()
    assert torch.equal(logits(model), live)
    model.delete_adapter("toy_bitfit")
    assert torch.equal(logits(model), base)


def test_unmatched_tensors_are_refused() -> None:
    with pytest.raises(MatchError, match="ToyBitFit 'toy_bitfit': target 'bias' matches no"):
        make("llama").add_adapter(ToyBitFit())


def test_a_dense_magnitude_scales_rows() -> None:
    """The toy's own formula, so that its tests above test something."""
    model = adapted(ToyMagnitude)
    shake(model, 0.1)
    linear = model.module.decoder.layers[0].mlp.linear_fc2
    x = torch.randn(3, 1, 48)
    weight = (
        linear.weight / linear.weight.norm(dim=1, keepdim=True) * linear.adapters["toy_magnitude"].magnitude[:, None]
    )
    assert torch.allclose(linear(x)[0], F.linear(x, weight), atol=1e-5)
