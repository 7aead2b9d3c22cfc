"""The ``adapter`` column: rows say which adapters act on them, also where rows are packed or asked."""

import json
from pathlib import Path

import pytest
import torch

from graftwork.data.sft import SFTDataModule
from graftwork.errors import DataError
from graftwork.virtual_tokens import PromptLayout, PromptSlot
from tests.helpers.tiny_tokenizer import tiny_tokenizer

LAYOUT = PromptLayout((PromptSlot("ada", 0, 3), PromptSlot("bob", 3, 2)))
ROWS = [
    {"input": "one", "output": "a", "adapter": "ada"},
    {"input": "two", "output": "b", "adapter": ["ada", "bob"]},
    {"input": "three", "output": "c", "adapter": None},
    {"input": "four", "output": "d"},
]
WAYS = [frozenset({"ada"}), frozenset({"ada", "bob"}), frozenset(), None]
VIRTUAL = [3, 5, 0, 5]
"""Virtual tokens in front of each row: those of the prompts that act on it."""


def module(root: Path, rows: list[dict[str, object]] = ROWS, **options: object) -> SFTDataModule:
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(root / "rows.jsonl")
    data = SFTDataModule(
        train=path, test=path, global_batch_size=4, micro_batch_size=2, seq_length=32, cache_dir=str(root), **options
    )
    data.attach(tokenizer=tiny_tokenizer(root / "tokenizer", 301), prompt_layout=LAYOUT)
    return data


def test_rows_go_the_way_that_they_name(tmp_path: Path) -> None:
    (batch,) = module(tmp_path).test_dataloader()
    assert [batch.routes.ways[int(i)] for i in batch.routes.chosen] == WAYS
    assert (batch.tokens >= 2**30).sum(1).tolist() == VIRTUAL
    halves = batch.microbatches()
    assert halves[1].routes.acts("bob").tolist() == [[False], [True]]


def test_samples_of_a_pack_go_their_own_way(tmp_path: Path) -> None:
    (batch,) = module(tmp_path, packing=True).test_dataloader()
    for name in ("ada", "bob"):
        acts = batch.routes.acts(name)
        assert acts.shape == batch.tokens.shape
        for row, samples in enumerate(batch.rows.tolist()):
            edges = batch.cu_seqlens[row].tolist()
            for sample, start, stop in zip(samples, edges, edges[1:]):
                way = None if sample < 0 else WAYS[sample]
                assert set(acts[row, start:stop].tolist()) <= {way is None or name in way}
    line = batch.in_one_line()
    assert torch.equal(line.routes.acts("ada")[0], batch.routes.acts("ada").reshape(-1))


def test_questions_go_the_way_that_they_name(tmp_path: Path) -> None:
    asked = [question for batch in module(tmp_path).questions("test") for question in batch.ways]
    assert asked == WAYS


def test_rows_that_name_nobody_have_no_routes(tmp_path: Path) -> None:
    (batch,) = module(tmp_path, [{"input": "one", "output": "a"}] * 4).test_dataloader()
    assert batch.routes is None


def test_a_marker_of_another_prompt_stands_for_nothing(tmp_path: Path) -> None:
    layout = PromptLayout((PromptSlot("ada", 0, 3, "template"), PromptSlot("bob", 3, 2, "template")))
    data = module(tmp_path, prompt_template="{virtual:ada}{input}{virtual:2}:")
    encoder = data.encoder_for(tiny_tokenizer(tmp_path / "tokenizer", 301), layout)
    markers = encoder.templates.of(None, None).markers
    assert [tuple(map(len, markers(None, way))) for way in WAYS] == [(3, 0), (3, 2), (0, 0), (3, 2)]


@pytest.mark.parametrize("given", [3, [3], {"name": "ada"}, True])
def test_an_adapter_that_is_no_name_is_refused(tmp_path: Path, given: object) -> None:
    with pytest.raises(DataError, match="line 1: field 'adapter"):
        list(module(tmp_path, [{"input": "one", "output": "a", "adapter": given}] * 4).test_dataloader())
