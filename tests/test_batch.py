"""The typed batch: how prompts and answers are laid out, and what its operations carry."""

import torch

from graftwork.batch import IGNORED, Batch
from graftwork.models import GPT, Model

N = IGNORED


def test_an_answer_follows_its_prompt():
    batch = Batch.following([[5, 6, 7], [8]], [[1, 2], [3]], "cpu")
    assert batch.tokens.tolist() == [[5, 6, 7, 1], [8, 0, 0, 0]]
    assert batch.labels.tolist() == [[N, N, 1, 2], [3, N, N, N]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.source is None and batch.source_lengths is None and not GPT.seq2seq


def test_a_prompt_goes_to_the_encoder_and_its_answer_to_the_decoder():
    batch = Batch.answering([[5, 6, 7], [8]], [[1, 2], [3]], start=9, device="cpu")
    assert batch.source.tolist() == [[5, 6, 7], [8, 0, 0]] and batch.source_lengths.tolist() == [3, 1]
    assert batch.tokens.tolist() == [[9, 1], [9, 0]]
    assert batch.labels.tolist() == [[1, 2], [3, N]]


def test_an_answer_without_a_token_leaves_no_target():
    assert Batch.answering([[5]], [[]], start=9, device="cpu").tokens.tolist() == [[9]]
    assert not Batch.following([[5, 6]], [[]], "cpu").count_targets()


def test_sources_go_wherever_their_rows_go():
    batch = Batch.answering([[5, 6], [7], [8, 9]], [[1], [2], [3, 4]], start=0, device="cpu")
    batch.micro_batch_size = 1
    parts = batch.microbatches()
    assert [part.source.tolist() for part in parts] == [[[5, 6]], [[7, 0]], [[8, 9]]]
    assert [part.source_lengths.tolist() for part in parts] == [[2], [1], [2]]
    assert batch.to("meta").source.device.type == "meta"
    kept = batch.at_positions(torch.tensor([1]))
    assert kept.tokens.tolist() == [[0], [0], [3]] and kept.source.equal(batch.source)


def test_a_causal_model_lays_out_what_the_batch_says():
    assert GPT.lay_out is not Model.lay_out
    laid = GPT.lay_out(None, [[5, 6]], [[1, 2]], torch.device("cpu"))
    assert laid.tokens.tolist() == [[5, 6, 1]] and laid.labels.tolist() == [[N, 1, 2]]
