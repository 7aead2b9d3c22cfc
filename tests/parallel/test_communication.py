"""What one training step sends equals a formula: nothing for what is frozen, low-rank tensors only for LoRA."""

from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from graftwork.optim import AdamW
from tests.helpers.distributed import run_ranks
from tests.helpers.standin import trainer_for
from tests.parallel.layouts import LAYOUTS, Cell
from tests.parallel.models import MIXTURE, model_of
from tests.parallel.rows import LENGTH, MICRO, ROWS, Rows
from tests.parallel.traffic import SpyOnStep, Traffic

H, KEYS, LAYERS, RANK = 48, 24, 4, 4
MICROBATCHES = ROWS // MICRO
ACTIVATION, LOW = LENGTH * MICRO * H, LENGTH * MICRO * RANK
"""Elements of one microbatch's activation [s, b, h], and of LoRA's [s, b, r]."""
SITES = 4 * LAYERS
Counted = tuple[Traffic, int, Counter[str]]


def listen(rank: int, world: int, sizes: dict[str, Any], root: Path) -> dict[str, Counted]:
    """Return, for full fine-tuning and LoRA: traffic of the third step, its answer tokens, trainable elements."""
    base = "mixture" if "expert_model_parallel_size" in sizes else "llama"
    return {subject: _listen(rank, world, sizes, Cell(base, subject), root) for subject in ("full", "lora")}


def _listen(rank: int, world: int, sizes: dict[str, Any], cell: Cell, root: Path) -> Counted:
    model, spy = model_of(cell, root), SpyOnStep(step=2)
    model.prepare(AdamW(lr=1e-3, schedule="constant"))
    trainer = trainer_for(sizes, world, rank, callbacks=[spy], limit_val_batches=0, gradient_clip_val=1.0)
    trainer.fit(model, datamodule=Rows(steps=3))
    return spy.spy.traffic, spy.tokens, trainable_of(model.named_parameters())


def trainable_of(named: Iterable[tuple[str, Any]]) -> Counter[str]:
    """Count this rank's trainable elements: those of its own experts, and all others; of these the pieces in halves."""
    trained = [(name, p.numel()) for name, p in named if p.requires_grad]
    dense = [size for name, size in reversed(trained) if ".experts." not in name]
    total = sum(dense)
    cut = -(-total // 2) not in accumulate(dense)
    experts = sum(size for name, size in trained if ".experts." in name)
    return Counter({"dense": total, "expert": experts, "pieces": len(dense) + cut})


@pytest.fixture(scope="module")
def heard(checkpoints: Path) -> Any:
    """Return a function from a layout to what its ranks sent."""
    found: dict[str, list[dict[str, Counted]]] = {}

    def ranks(layout: str) -> list[dict[str, Counted]]:
        if layout not in found:
            found[layout] = run_ranks(listen, 2, LAYOUTS[layout].sizes, checkpoints)
        return found[layout]

    return ranks


def added(*parts: Traffic) -> Traffic:
    """Return the sum of several counts."""
    kinds = sorted({kind for part in parts for kind in part})
    sums = {k: tuple(sum(part.get(k, (0, 0))[i] for part in parts) for i in (0, 1)) for k in kinds}
    return {kind: (calls, elements) for kind, (calls, elements) in sums.items() if calls}


def numbers(count: int) -> Traffic:
    return {"all_reduce": (count, count)}


def gradient_sum(subject: str, trainable: Counter[str]) -> Traffic:
    """One bucket of exactly the trainable gradients; shared out in full fine-tuning, where weights come back.

    A reduce-scatter and an all-gather are the two halves that an all-reduce of as many elements is made of.
    """
    elements = trainable["dense"]
    if subject == "lora":
        return {"all_reduce": (1, elements)}
    even = elements + elements % 2
    norms = {"all_reduce": (1, trainable["pieces"])}
    return added({"reduce_scatter": (1, even), "all_gather": (1, even)}, norms)


def times(count: int, elements: int) -> tuple[int, int]:
    return count, count * elements


def cut_vocabulary(tokens: int) -> Traffic:
    """The cross entropy over a cut vocabulary: largest logit; sum of exponentials and target's logit of each token."""
    return {"all_reduce": (2 * MICROBATCHES, 3 * tokens)}


@pytest.mark.processes
def test_data_parallel_sends_each_trainable_element_once(heard: Any) -> None:
    """The trainable gradients, the answer tokens and the loss; the norm is known, but for that of the other's half."""
    for rank in heard("dp2"):
        for subject, (traffic, _, trainable) in rank.items():
            assert traffic == added(gradient_sum(subject, trainable), numbers(2))
        assert rank["lora"][2]["dense"] < rank["full"][2]["dense"] / 3


@pytest.mark.processes
def test_tensor_parallel_full_fine_tuning(heard: Any) -> None:
    """Two sums of activations a layer forward, two backward, the embedding, the answers' hidden states backward."""
    for rank in heard("tp2"):
        traffic, tokens, _ = rank["full"]
        hidden = {"all_reduce": times(MICROBATCHES * (4 * LAYERS + 1), ACTIVATION)}
        answers = {"all_reduce": (MICROBATCHES, tokens * H)}
        assert traffic == added(hidden, answers, cut_vocabulary(tokens), numbers(1))


@pytest.mark.processes
def test_tensor_parallel_lora_adds_low_rank_tensors_only(heard: Any) -> None:
    """One sum of [s, b, r] a site: backward beside a column-parallel linear, forward beside a row-parallel one.

    What the first linear reads gets no gradient: nothing below it trains.
    """
    for rank in heard("tp2"):
        low = {"all_reduce": times(MICROBATCHES * SITES, LOW)}
        first = {"all_reduce": times(MICROBATCHES, ACTIVATION)}
        assert added(rank["lora"][0], first) == added(rank["full"][0], low)


@pytest.mark.processes
def test_sequence_parallel_full_fine_tuning(heard: Any) -> None:
    """Gathers in front of column-parallel linears (again for their weights' gradient), scatters behind the others."""
    partial = (2 * LAYERS + 1) * H  # norms have seen a part of the sequence
    for rank in heard("tp2_sp"):
        traffic, tokens, _ = rank["full"]
        gathers = MICROBATCHES * (6 * LAYERS + 1 + 1)  # + the embedding's gradient, the output layer
        scatters = MICROBATCHES * (4 * LAYERS + 1 + 1)
        sequence = {"all_gather": times(gathers, ACTIVATION), "reduce_scatter": times(scatters, ACTIVATION)}
        sums = {"all_reduce": (1, partial)}
        assert traffic == added(sequence, sums, cut_vocabulary(tokens), numbers(1))


@pytest.mark.processes
def test_sequence_parallel_lora_adds_low_rank_tensors_only(heard: Any) -> None:
    """A gather and a scatter of [s, b, r] a site; no gather for a frozen weight's gradient, no scatter below the first.

    The embedding scatters what it looks up, the output layer its gradient.
    """
    partial = LAYERS * RANK * 4 * H  # A of qkv and fc1 [r, h], B of proj and fc2 [h, r] have seen a part
    for rank in heard("tp2_sp"):
        traffic, tokens, _ = rank["lora"]
        gathers = scatters = MICROBATCHES * (4 * LAYERS + 1)  # of the first qkv none
        sequence = {"all_gather": times(gathers, ACTIVATION), "reduce_scatter": times(scatters, ACTIVATION)}
        low = {"all_gather": times(MICROBATCHES * SITES, LOW), "reduce_scatter": times(MICROBATCHES * SITES, LOW)}
        sums = {"all_reduce": (1, partial)}
        assert traffic == added(sequence, low, sums, cut_vocabulary(tokens), numbers(1))


@pytest.mark.processes
def test_pipeline_parallel_sends_activations_the_loss_and_the_norm(heard: Any) -> None:
    """Each stage sends one activation (or its gradient) a microbatch; adapters add nothing."""
    for rank in heard("pp2"):
        for traffic, _, _ in rank.values():
            assert traffic == added({"send": times(MICROBATCHES, ACTIVATION), "broadcast": (1, 1)}, numbers(1))


@pytest.mark.processes
def test_context_parallel_gathers_keys_and_values(heard: Any) -> None:
    """Keys and values of a layer forward and again backward, sums of their gradients; the trainable gradients, loss."""
    for rank in heard("cp2"):
        for subject, (traffic, _, trainable) in rank.items():
            sites = times(2 * LAYERS * MICROBATCHES, LENGTH * MICRO * KEYS)
            sums = added({"all_reduce": sites}, gradient_sum(subject, trainable), numbers(1))
            assert traffic == added({"all_gather": sites}, {"all_gather": sites}, sums)


@pytest.mark.processes
def test_expert_parallel_sends_tokens_to_their_experts_and_back(heard: Any) -> None:
    """Each chosen (token, expert) travels there with its weight and back, forward and backward; adapters add nothing.

    Of the gradients those of shared parameters travel; an expert's is on one rank. Numbers: tokens, loss, norm.
    """
    layers, h, experts = MIXTURE.num_layers, MIXTURE.hidden_size, 4
    microbatches = MICROBATCHES // 2  # the two ranks share the rows
    chosen = layers * ROWS * LENGTH * 2  # of both ranks together; a rank's share depends on the router
    ranks = heard("ep2")
    for subject in ("full", "lora"):
        sent = [rank[subject][0].pop("all_to_all") for rank in ranks]
        assert {calls for calls, _ in sent} == {6 * layers * microbatches}
        assert sum(elements for _, elements in sent) == chosen * 2 * (h + 1 + h)
        for traffic, _, trainable in (rank[subject] for rank in ranks):
            counts = {"all_gather": times(layers * microbatches, 2 * experts)}  # how many tokens each expert gets
            assert traffic == added(counts, gradient_sum(subject, trainable), numbers(3))
            assert trainable["expert"] > 0


def test_one_process_sends_nothing(checkpoints: Path) -> None:
    from graftwork import parallel

    assert all(traffic == {} for traffic, _, _ in listen(0, 1, {}, checkpoints).values())
    parallel.destroy()
