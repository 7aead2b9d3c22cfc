"""The cells of the fidelity matrix: which model, method, data and recomputation are trained in which layout."""

from dataclasses import dataclass
from typing import Any

from tests.contracts.methods import STACKS


@dataclass(frozen=True)
class Ranks:
    """A layout: its title in the documentation, number of ranks, the strategy's sizes."""

    title: str
    world: int
    sizes: dict[str, Any]


def _ranks(title: str, world: int, tp: int = 1, pp: int = 1, vp: int | None = None, **more: Any) -> Ranks:
    named = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
    }
    return Ranks(title, world, {**{k: v for k, v in named.items() if v not in (None, 1)}, **more})


SP: dict[str, Any] = {"sequence_parallel": True}
CP: dict[str, Any] = {"context_parallel_size": 2}
EP: dict[str, Any] = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, Ranks] = {
    "tp2": _ranks("TP2", 2, tp=2),
    "tp2_sp": _ranks("TP2+SP", 2, tp=2, **SP),
    "pp2": _ranks("PP2", 2, pp=2),
    "pp2_vpp2": _ranks("PP2×VPP2", 2, pp=2, vp=2),
    "cp2": _ranks("CP2", 2, **CP),
    "dp2": _ranks("DP2", 2),
    "ep2": _ranks("EP2", 2, **EP),
    "tp2_pp2": _ranks("TP2×PP2", 4, tp=2, pp=2),
    "tp2_sp_ep2": _ranks("TP2+SP×EP2", 2, tp=2, **SP, **EP),
    "tp2_dp2": _ranks("TP2×DP2", 4, tp=2),
    "tp2_sp_cp2": _ranks("TP2+SP×CP2", 4, tp=2, **SP, **CP),
    "pp2_cp2": _ranks("PP2×CP2", 4, pp=2, **CP),
    "pp2_ep2": _ranks("PP2×EP2", 4, pp=2, **EP),
}
PRODUCTS = ("tp2_sp_ep2", "tp2_dp2", "tp2_sp_cp2", "pp2_cp2", "pp2_ep2")
"""Layouts of several axes that train everything once, not every method."""
SUBJECTS: dict[str, str] = {
    "base": "base, forward only",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "canonical": "CanonicalAdapter",
    "ia3": "IA3",
    "ptuning": "PTuning",
    "lora+ia3": "[LoRA, IA3]",
    "ptuning+canonical": "[PTuning, CanonicalAdapter]",
    "all": "all four",
    "lora's relatives": "[DoRA, CanonicalLoRA, LoRA]",
}
TASKS: dict[str, str] = {"tasks": "[PTuning with an LSTM, PromptTuning], each with two tasks"}
"""Prompts by task, whose rows take turns; trained where a prompt meets another layout than in one process."""
assert set(SUBJECTS) - {"base", "full"} <= set(STACKS)
LENT: dict[str, str] = {
    "lent+tied": "[Selective, tied parallel CanonicalAdapter, IA3]",
    "lent+parallel": "[Selective, parallel CanonicalAdapter, IA3]",
    "lent experts": "[Selective of experts and router, tied parallel CanonicalAdapter, IA3]",
    "shared experts": "[DoRA, CanonicalLoRA and LoRA, each one for all experts of a layer]",
}
"""Stacks that need tensors which not every model has; ``models.LENDING`` builds them."""
TITLES = {**SUBJECTS, **TASKS, **LENT}


@dataclass(frozen=True)
class Cell:
    """``base``: a family of tests.helpers.tiny_hf, or "mixture" (of experts); ``subject``: a key of TITLES.

    ``routed``: rows (of a pack, samples) go to different adapters of the subject.
    """

    base: str
    subject: str
    packed: bool = False
    recompute: str | None = None
    routed: bool = False

    def __str__(self) -> str:
        flags = ["packed" if self.packed else "", "routed" if self.routed else ""]
        return "-".join(
            part for part in (self.base, self.subject, *flags, self.recompute and f"recompute-{self.recompute}") if part
        )


def cells_of(layout: str) -> list[Cell]:
    """Return the cells that a layout runs: every subject, then what needs another model, packing or recomputation."""
    experts = "ep2" in layout
    main = "mixture" if experts else "llama"
    if layout in PRODUCTS:
        return [Cell(main, subject) for subject in ("full", "all")]
    special = [Cell(main, "lent experts"), Cell(main, "shared experts")] if experts else _special(layout)
    return [*(Cell(main, subject) for subject in SUBJECTS), *special]


def _special(layout: str) -> list[Cell]:
    # gpt2: learned positions (the embedding scatters the sequence later), tied embeddings, biases
    lent = "lent+parallel" if "pp2" in layout else "lent+tied"  # layers on two stages cannot be tied
    learned = [Cell("gpt2", subject) for subject in ("full", "ptuning", "all", lent)]
    if "tp2" in layout:  # biases that a magnitude leaves alone
        learned.append(Cell("gpt2", "lora's relatives"))
    # qwen3: norms of queries and keys, which see only a rank's heads
    normed = [Cell("qwen3", subject) for subject in ("full", "ia3")]
    packed = [] if layout == "cp2" else [Cell("llama", subject, packed=True) for subject in ("full", "all")]
    replayed = [Cell("llama", "all", recompute="full"), Cell("llama", "ptuning", recompute="full")]
    tasks = [Cell("llama", "tasks", packed=layout == "pp2")] if layout in ("tp2", "tp2_sp", "pp2", "dp2") else []
    return [*learned, *normed, *packed, *replayed, *tasks, *_routed(layout)]


def _routed(layout: str) -> list[Cell]:
    """Routes of whole rows and of packed samples; recomputed where another microbatch is under way by then."""
    rows = Cell("llama", "all", recompute="full" if "pp2" in layout else None, routed=True)
    samples = [Cell("llama", "all", packed=True, routed=True)] if layout == "tp2_sp" else []
    return [rows, *samples]
