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
    "cp2_dp2": _ranks("CP2×DP2", 4, **CP),
    "cp2_ep2": _ranks("CP2×EP2", 2, **CP, **EP),
}
PRODUCTS = ("tp2_sp_ep2", "tp2_dp2", "tp2_sp_cp2", "pp2_cp2", "pp2_ep2", "cp2_dp2", "cp2_ep2")
"""Layouts of several axes that train everything once, not every method."""
SUBJECTS: dict[str, str] = {
    "base": "base, forward only",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "ptuning": "PTuning",
    "everything": "one of every method",
}
"""What every layout trains. The stack shows each tensor of each method, so one method alone is a cell only where less
is at work than in the stack: LoRA, and P-tuning, of which later pipeline stages train nothing."""
PROMPTED = ("tp2", "tp2_sp", "pp2", "cp2", "dp2")
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
TITLES = {**SUBJECTS, "ia3": "IA3", **TASKS, **LENT}


@dataclass(frozen=True)
class Cell:
    """``base``: a family of tests.helpers.tiny_hf or tiny_t5, or "mixture" (of experts); ``subject``: "base", "full" or
    the name of a stack in contracts.methods.STACKS or models.LENDING.

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
    # qwen2_moe: loaded, with an expert beside the others that is cut as an MLP is, in every other layer
    subjects = ("full", "everything") if layout == "tp2_sp_ep2" else ()
    loaded = [Cell("qwen2_moe_every_other", subject) for subject in subjects]
    if layout in PRODUCTS:
        packs = ([False] if layout not in ("cp2_dp2", "cp2_ep2") else []) + ([True] if "cp2" in layout else [])
        return [*(Cell(main, subject, packed) for packed in packs for subject in ("full", "everything")), *loaded]
    special = [Cell(main, "lent experts"), Cell(main, "shared experts")] if experts else _special(layout)
    return [*(Cell(main, subject) for subject in SUBJECTS), *special]


def _special(layout: str) -> list[Cell]:
    # gpt2: learned positions (the embedding scatters the sequence later), tied embeddings, biases
    lent = "lent+parallel" if "pp2" in layout else "lent+tied"  # layers on two stages cannot be tied
    learned = [Cell("gpt2", subject) for subject in ("full", "everything", lent)]
    # qwen3: norms of queries and keys, which see only a rank's heads
    normed = [Cell("qwen3", subject) for subject in ("full", "ia3")]
    packed = [Cell("llama", subject, packed=True) for subject in ("full", "everything")]
    packed += [Cell("gpt2", "full", packed=True)] if layout == "cp2" else []
    # between pipeline stages the stack is replayed with routes, below
    again = ("ptuning",) if "pp2" in layout else ("everything", "ptuning")
    replayed = [Cell("llama", subject, recompute="full") for subject in again]
    tasks = [Cell("llama", "tasks", packed=layout in ("pp2", "cp2"))] if layout in PROMPTED else []
    return [*learned, *normed, *packed, *replayed, *tasks, *_routed(layout), *_encoded(layout)]


def _routed(layout: str) -> list[Cell]:
    """Routes of whole rows and of packed samples; recomputed where another microbatch is under way by then."""
    rows = Cell("llama", "everything", recompute="full" if "pp2" in layout else None, routed=True)
    again = "full" if layout == "cp2" else None
    packed = layout in ("tp2_sp", "cp2")
    samples = [Cell("llama", "everything", packed=True, recompute=again, routed=True)] if packed else []
    return [rows, *samples]


def _encoded(layout: str) -> list[Cell]:
    """An encoder and a decoder: tied with relu, or untied and gated; its layers and sequences cannot be divided."""
    if layout not in ("tp2", "tp2_sp", "dp2"):
        return []
    tied = [Cell("t5", subject) for subject in ("base", "full")]
    untied = [Cell("mt5", "full", recompute="full"), Cell("mt5", "everything")]
    routed = [Cell("mt5", "everything", recompute="full", routed=True)] if layout == "tp2_sp" else []
    return [*tied, *untied, *routed]
