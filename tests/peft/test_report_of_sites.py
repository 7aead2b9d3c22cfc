"""What a stack adds, before anything is trained: sites, shapes, counts, also on a model without memory."""

import torch

from graftwork.models import GPT
from graftwork.peft import IA3, CanonicalAdapter, LoRA, PTuning, report
from graftwork.peft.adapter import Birth
from tests.contracts.methods import make, shape

H, FFN, GROUPS, WIDTH, LAYERS = 32, 48, 2, 8, 2


def counts(model: GPT) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in report.sites(model.stack):
        found[row.adapter] = found.get(row.adapter, 0) + row.parameters
    return found


def stack() -> list:
    return [LoRA(dim=4), IA3(), CanonicalAdapter(dim=6), PTuning(virtual_tokens=3, embedding_dim=12, bottleneck_dim=10)]


def test_counts_equal_the_papers_formulas() -> None:
    model = make()
    model.add_adapter(stack())
    qkv = WIDTH * (4 + 2 * GROUPS)
    assert counts(model) == {
        "lora": LAYERS * 4 * ((H + qkv) + (H + H) + (H + 2 * FFN) + (FFN + H)),
        "ia3": LAYERS * (2 * WIDTH * GROUPS + FFN),
        "canonical_adapter": LAYERS * 2 * (2 * H * 6 + 2 * H),
        "ptuning": 3 * 12 + 10 * 12 + 10 + H * 10 + H,
    }
    assert sum(counts(model).values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_table_names_sites_and_totals() -> None:
    model = make()
    model.add_adapter([LoRA(dim=4), IA3()])
    text = model.adapter_report(shape().total_parameters())
    assert "decoder.layers.0.self_attention.linear_qkv" in text and "lora_A [4, 32], lora_B [64, 4]" in text
    assert f"{sum(counts(model).values()):,} adapter parameters" in text and text.endswith(
        f"{shape().total_parameters():,}"
    )
    assert len(report.as_text(model.stack, 1000, limit=3).splitlines()) == 1 + 3 + 2


def test_a_model_without_memory_gets_adapters_without_memory() -> None:
    model = make()
    wanted = counts_of(model)
    empty = GPT(shape(), dtype="fp32")
    empty.configure_model()
    empty.module.to_empty(device="meta")
    empty.add_adapter(stack())
    assert counts(empty) == wanted
    assert all(p.device.type == "meta" for p in empty.parameters())


def counts_of(model: GPT) -> dict[str, int]:
    model.add_adapter(stack())
    return counts(model)


def test_initial_values_of_a_tensor_have_their_own_stream() -> None:
    birth = Birth(1, "lora", "decoder.layers.0.mlp.linear_fc1", torch.device("cpu"))
    first, second = (torch.randn(3, generator=birth.generator(name)) for name in ("lora_A", "lora_B"))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.randn(3, generator=birth.generator("lora_A")))
