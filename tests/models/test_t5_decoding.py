"""Generation with an encoder: token by token what transformers generates, cached or not, alone or beside others."""

from dataclasses import replace

import pytest
import torch

from graftwork import models, parallel
from graftwork.core.t5 import DecoderCache, RelativeT5
from graftwork.errors import ConfigError
from graftwork.models.generation.scoring import evaluating, last_logits
from graftwork.peft import METHODS, LoRA, PTuning
from graftwork.virtual_tokens import VIRTUAL_BASE
from tests.contracts.methods import shake
from tests.contracts.methods import tiny as small
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.tiny_t5 import KINDS, VOCABULARY, make_t5, oracle, tiny

START, NEW = 0, 12


@pytest.fixture(scope="module", params=list(KINDS))
def checkpoint(request, tmp_path_factory):
    return make_t5(request.param, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load(make_t5("t5v11", tmp_path_factory.mktemp("hf")))


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def theirs(directory, rows: list[list[int]], end: int | None) -> list[list[int]]:
    """transformers' greedy answers to right-padded prompts, without the start token, up to and with the end."""
    width = max(map(len, rows))
    found = oracle(directory).generate(
        input_ids=torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        max_new_tokens=NEW, do_sample=False, num_beams=1, eos_token_id=10**6 if end is None else end, pad_token_id=0,
        use_cache=False,  # its cache has a place for each layer of the encoder, and ours are more in the decoder
    )  # fmt: skip
    answers = [row[1:] for row in found.tolist()]
    return [row[: row.index(end) + 1] if end in row else row for row in answers]


def test_greedy_answers_are_those_of_transformers(checkpoint):
    model, asked = models.load(checkpoint), prompts(9, 1, 30, 17, 4)
    whole = theirs(checkpoint, asked, None)
    assert all(len(row) == NEW for row in whole) and len({tuple(row) for row in whole}) > 1
    assert model.generate(asked, NEW, stop_ids=[]) == whole
    end = whole[0][3]  # now some answers end early, and leave the batch
    ended = theirs(checkpoint, asked, end)
    assert len({len(row) for row in ended}) > 1
    for options in ({}, {"use_cache": False}, {"batch_size": 2}):
        assert model.generate(asked, NEW, stop_ids=[end], **options) == ended


def test_with_adapters_the_cache_is_exact(model):
    fresh = tiny("t5")
    fresh.add_adapter([PTuning(virtual_tokens=3), LoRA(dim=4)])
    shake(fresh)
    asked = [[VIRTUAL_BASE + i for i in range(3)] + row for row in prompts(5, 11, 8)]
    cached = fresh.generate(asked, NEW, stop_ids=[])
    assert cached == fresh.generate(asked, NEW, stop_ids=[], use_cache=False)
    with fresh.adapters_disabled():
        assert cached != fresh.generate([row[3:] for row in asked], NEW, stop_ids=[])


ADAPTED = {**{name: [name] for name in METHODS}, "everything": list(METHODS)}


@pytest.mark.parametrize("stack", ADAPTED)
def test_the_cache_is_exact_under_every_method(stack, monkeypatch):
    """What an adapter is put around leaves the module tree; a cache that looks for it there reads too little."""
    fresh = tiny("t5v11")
    fresh.add_adapter([small(METHODS[name]) for name in ADAPTED[stack]])
    shake(fresh)
    front = [i for slot in fresh.prompt_layout.slots for i in slot.ids]
    asked = [front + row for row in prompts(5, 11, 8)]
    cached = fresh.generate(asked, NEW, stop_ids=[])
    assert cached == fresh.generate(asked, NEW, stop_ids=[], use_cache=False)
    chunk = fresh.chunks[0]
    seen = {m for m in chunk.decoder.modules() if m in chunk.remembering}
    hidden = "CanonicalAdapter" in ADAPTED[stack]
    assert (len(chunk.remembering), len(seen)) == (6, 0 if hidden else 6)
    if hidden:  # deliberate break
        monkeypatch.setattr(chunk, "remembering", ())
        with pytest.raises(RuntimeError, match="shape"):
            fresh.generate(asked, NEW, stop_ids=[])


def test_samples_are_repeatable_and_do_not_depend_on_the_batch(model):
    asked = prompts(9, 3, 14)
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 5, "stop_ids": []}
    found = model.generate(asked, NEW, **options)
    assert found == model.generate(asked, NEW, **options) == model.generate(asked, NEW, batch_size=1, **options)
    assert found == model.generate(asked, NEW, use_cache=False, **options)
    assert found != model.generate(asked, NEW, **{**options, "seed": 6})
    assert found != model.generate(asked, NEW, stop_ids=[])


def test_the_last_logits_are_those_of_the_whole_row(model):
    (prompt,), answer = prompts(7), [5, 9, 44]
    with evaluating(model):
        found = last_logits(model, [prompt, prompt], [answer, answer[:1]])
        whole = model(torch.tensor([prompt]), torch.tensor([[START, *answer]]))[0]
    assert torch.allclose(found, whole[[3, 1]], atol=1e-5)


def test_other_ids_and_empty_prompts_are_refused(model):
    with pytest.raises(ConfigError, match=f"Prompt 1 holds the token id {VOCABULARY}; valid: 0 to {VOCABULARY - 1}"):
        model.generate([[5], [VOCABULARY]])
    with pytest.raises(ConfigError, match="Prompt 0 is empty"):
        model.generate([[]])
    with pytest.raises(ConfigError, match=f"the token id {VIRTUAL_BASE}; valid: 0 to {VOCABULARY - 1}"):
        model.generate([[VIRTUAL_BASE, 5]])
    assert model.generate([[5]], 1, stop_ids=[]) and model.generate([prompts(700)[0]], 1, stop_ids=[])  # no limit


def test_breaks_are_noticed(model, monkeypatch):
    """Another start, a source that is read to its end, and rows that are mixed up each give other answers."""
    asked = prompts(9, 2, 14)
    right = model.generate(asked, NEW, stop_ids=[])

    def differs() -> bool:
        return model.generate(asked, NEW, stop_ids=[]) != right

    encode, read = RelativeT5.encode, DecoderCache.read
    with monkeypatch.context() as broken:
        broken.setattr(RelativeT5, "encode", lambda self, s, n: encode(self, s, torch.full_like(n, s.shape[1])))
        assert differs()
    with monkeypatch.context() as broken:
        broken.setattr(DecoderCache, "read", lambda self, ids: read(self, ids if self.length else ids + 1))
        assert differs()
    with monkeypatch.context() as broken:
        broken.setattr(DecoderCache, "read", lambda self, ids: read(self, ids).roll(1, 0))
        assert differs()
    assert not differs()


def test_prompts_go_to_adapters_of_their_own(model):
    """The encoder follows the route too: each row is as if its adapter were asked alone, also when others have left."""
    fresh = tiny("t5v11")
    fresh.add_adapter([LoRA(name="a", dim=4), LoRA(name="b", dim=4)])
    shake(fresh)
    asked, ways = prompts(9, 2, 14, 6), ["a", "b", None, "a"]
    end = fresh.generate(asked[:1], NEW, stop_ids=[], adapter=["a"])[0][1]
    alone = [fresh.generate([row], NEW, stop_ids=[end], adapter=[way])[0] for row, way in zip(asked, ways)]
    assert len({len(answer) for answer in alone}) > 1
    for cached in (True, False):
        assert fresh.generate(asked, NEW, stop_ids=[end], adapter=ways, use_cache=cached) == alone
    assert fresh.generate(asked, NEW, stop_ids=[end], adapter=["b", "a", "a", None]) != alone


def answers_in_layout(rank, world, directory, scattered):
    parallel.initialize(replace(layout_of(**({"tensor": world} if world > 1 else {})), sequence_parallel=scattered))
    model = models.load(directory, dtype="fp32")
    model.configure_model()
    found = model.generate(prompts(9, 2, 15, 6), 5, stop_ids=[])
    parallel.destroy()
    return found


@pytest.mark.processes
@pytest.mark.parametrize("scattered", [False, True], ids=["tp2", "tp2-sp"])
def test_layouts_give_one_processs_answers(tmp_path, scattered):
    directory = str(make_t5("t5v11", tmp_path))
    ranks = run_ranks(answers_in_layout, 2, directory, scattered)
    assert ranks[0] == ranks[1] == answers_in_layout(0, 1, directory, False)
