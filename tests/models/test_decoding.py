"""Generation equals transformers' own, with and without a cache, and treats rows as if each were alone."""

import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftwork import parallel
from graftwork.errors import ConfigError
from graftwork.models import GPT, load
from graftwork.models.generation import kv_cache
from graftwork.models.generation.decoding import _groups
from graftwork.models.generation.sampling import Sampler
from graftwork.models.shapes import Shape
from graftwork.models.weights import read_config, shape_from_hf
from graftwork.parallel.record import record_of
from graftwork.peft import IA3, CanonicalAdapter, LoRA, PTuning
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.tiny_hf import ODD_VOCABULARY, make_tiny, oracle
from tests.helpers.tiny_tokenizer import tiny_tokenizer

NEW = 14


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def checkpoint(request, tmp_path_factory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def model(checkpoint) -> GPT:
    return load(checkpoint, dtype="fp32")


def prompts(count: int = 6, seed: int = 0, vocabulary: int = ODD_VOCABULARY) -> list[list[int]]:
    """Random prompts of 3 to 30 tokens, several of one length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 9, 9, 30, 5, 22, 4, 17][:count]
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def attach(model: GPT) -> None:
    """Attach one adapter of every method, moved off the identity."""
    model.add_adapter(
        [
            LoRA(dim=4),
            IA3(),
            CanonicalAdapter(dim=8),
            PTuning(virtual_tokens=3, embedding_dim=16, bottleneck_dim=16),
        ]
    )
    for item in (item for items in model.stack.grafted.values() for item in items):
        for name, parameter in item.adapter.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{item.site.name}.{name}".encode()))
            sharding = record_of(parameter).sharding
            noise = torch.randn(sharding.shape, generator=generator) * 0.1
            parameter.data.add_(sharding.take(noise, parallel.tp_rank(), parallel.tp_size()))


def transformers_greedy(directory: Path, prompt: list[int], stop: int | None) -> list[int]:
    theirs = oracle(directory)
    theirs.generation_config.eos_token_id = stop
    ids = torch.tensor([prompt])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers_cached_and_uncached(checkpoint, model):
    asked = prompts()
    free = model.generate(asked, max_new_tokens=NEW, stop_ids=[])
    stop = free[1][4]  # a token that does occur stops some rows early and others not
    for stops, one in (([], None), ([stop], stop)):
        cached = model.generate(asked, max_new_tokens=NEW, stop_ids=stops)
        assert cached == [transformers_greedy(checkpoint, prompt, one) for prompt in asked]
        assert cached == model.generate(asked, max_new_tokens=NEW, stop_ids=stops, use_cache=False)
    assert any(len(answer) < NEW for answer in cached) and any(len(answer) == NEW for answer in free)
    assert len({tuple(answer) for answer in free}) > 1


def test_cache_is_used_and_its_positions_matter(model, monkeypatch):
    """The comparison above would be blind if the cache were never read, or if wrong positions changed nothing."""
    asked = prompts(4)
    right = model.generate(asked, max_new_tokens=NEW, stop_ids=[])
    read = kv_cache.KVCache.read
    widths = []

    def shifted(self, rows):
        widths.append(len(rows[0]) - self.context.sequence_len_offset)
        logits = read(self, rows)
        for keys, values in self.context.key_value_memory_dict.values():
            keys[0].zero_(), values[0].zero_()
        return logits

    monkeypatch.setattr(kv_cache.KVCache, "read", shifted)
    assert model.generate(asked, max_new_tokens=NEW, stop_ids=[]) != right
    assert set(widths) - {1}, "the prompt is read at once"
    assert widths.count(1) > len(widths) / 2, "then one position at a time"


def test_logits_of_cache_equal_the_plain_forward(model):
    attach(model)
    for chunk in model.chunks:
        chunk.double()  # fp32 rounds differently, by processor
    ids = prompts(1, seed=3)[0] + prompts(4, seed=4)[3]
    with torch.no_grad():
        whole = model(torch.tensor([ids]))[0]
    model.eval()
    with kv_cache.KVCache(model, 1, len(ids)) as cache, torch.no_grad():
        for stop in range(2, len(ids) + 1):
            difference = cache.read([ids[:stop]])[0] - whole[stop - 1]
            assert difference.abs().max() < 1e-6 * whole.abs().max()
    assert not [h for h in model.chunks[0].decoder._forward_hooks.values() if h is kv_cache._last_position]


def test_adapters_and_virtual_tokens(model):
    attach(model)
    virtual = model.prompt_layout.ids("ptuning")
    asked = [virtual + p for p in prompts()]
    cached = model.generate(asked, max_new_tokens=NEW, stop_ids=[])
    assert cached == model.generate(asked, max_new_tokens=NEW, stop_ids=[], use_cache=False)
    with model.adapters_disabled():
        assert model.generate(prompts(), max_new_tokens=NEW, stop_ids=[]) != cached
        with pytest.raises(ConfigError, match=f"holds the token id {virtual[0]}; valid: 0 to 100\\."):
            model.generate(asked, stop_ids=[])


def test_rows_do_not_depend_on_each_other(model):
    asked = prompts(8)
    for options in ({"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.9, "seed": 5}):
        together = model.generate(asked, max_new_tokens=NEW, stop_ids=[7, 8, 9], **options)
        assert together == model.generate(asked, max_new_tokens=NEW, stop_ids=[7, 8, 9], batch_size=3, **options)
        assert together == model.generate(asked, max_new_tokens=NEW, stop_ids=[7, 8, 9], use_cache=False, **options)


def test_groups_hold_every_prompt_once_and_no_wide_gap():
    asked = [[0] * n for n in (40, 3, 5, 90, 4, 18, 3, 41)]
    assert list(_groups(asked, size=3, gap=16)) == [[1, 6, 4], [2, 5], [0, 7], [3]]
    assert list(_groups(asked, size=16, gap=0)) == [[1, 6], [4], [2], [5], [0], [7], [3]]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]])
    draws = 4000
    sampler = Sampler(temperature=0.7, top_p=1.0, seed=0)
    counts = torch.bincount(torch.tensor(sampler.choose(logits.expand(draws, -1), [0] * draws)), minlength=5).double()
    expected = torch.softmax(logits[0].double() / 0.7, -1)
    assert counts[4] == 0
    torch.testing.assert_close(counts / draws, expected, atol=0.025, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    sampler = Sampler(temperature=1.0, top_p=0.7, seed=0)
    drawn = sampler.choose(probabilities.log().expand(500, -1), [0] * 500)
    assert set(drawn) == {1, 3}
    assert abs(drawn.count(1) / 500 - 0.5 / 0.75) < 0.08
    tiny = Sampler(temperature=1.0, top_p=1e-6, seed=0)
    assert set(tiny.choose(probabilities.log().expand(50, -1), [0] * 50)) == {1}


def test_seed_repeats_and_no_seed_does_not(model):
    asked = prompts(2)
    state = torch.get_rng_state()
    options = {"max_new_tokens": NEW, "stop_ids": [], "temperature": 2.0}
    first = model.generate(asked, seed=3, **options)
    assert first == model.generate(asked, seed=3, **options)
    assert first != model.generate(asked, seed=4, **options)
    assert model.generate(asked, **options) != model.generate(asked, **options)
    assert torch.equal(state, torch.get_rng_state()), "training goes on as if nothing had been sampled"


def test_padding_vocabulary_is_never_chosen():
    shape = Shape(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=16,
        num_attention_heads=2,
        vocab_size=5,
        max_position_embeddings=64,
    )
    module = GPT(shape, dtype="fp32")
    module.configure_model()
    module.shape = Shape(**{**vars(shape), "vocab_size": 4})  # the module has one row more than the vocabulary
    for cache in (True, False):
        out = module.generate([[0, 1]], 40, temperature=5.0, seed=0, stop_ids=[], use_cache=cache)
        assert set(out[0]) == {0, 1, 2, 3}


def test_modes_are_restored_also_after_an_error(model):
    model.train()
    model.chunks[0].decoder.layers[1].eval()
    before = [module.training for module in model.modules()]
    model.generate(prompts(2), max_new_tokens=2, stop_ids=[])
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()
    with pytest.raises(ConfigError):
        model.generate([[5, 999]], stop_ids=[])
    assert [module.training for module in model.modules()] == before
    output = model(torch.tensor([[1, 2, 3]]))
    output.sum().backward()  # rotary tables made while generating serve training


@pytest.mark.parametrize(
    "asked, options, message",
    [
        ([[1], []], {}, r"Prompt 1 is empty"),
        ([[1, 101]], {}, r"Prompt 0 holds the token id 101; valid: 0 to 100\."),
        ([[1] * 120], {"max_new_tokens": 9}, r"context is 128 tokens; ask for at most 8 new tokens"),
        ([[1] * 130], {}, r"Prompt 0 has 130 tokens .* keep fewer than 128"),
        ([[1]], {"max_new_tokens": 0}, r"max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, r"temperature is -1.0"),
        ([[1]], {"top_p": 0.0}, r"top_p is 0.0"),
    ],
)
def test_what_cannot_be_generated_is_one_clear_sentence(model, asked, options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        model.generate(asked, **{"stop_ids": [], **options})
    assert "\n" not in str(raised.value)


def test_the_last_position_of_the_context_can_be_filled(model):
    room = 128 - 5
    assert len(model.generate([[1, 2, 3, 4, 5]], max_new_tokens=room, stop_ids=[])[0]) == room


def test_default_stop_is_the_tokenizers_end(tmp_path):
    model = GPT(
        Shape(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, vocab_size=300,
              max_position_embeddings=64), dtype="fp32",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"model\.tokenizer"):
        model.generate([[1]], max_new_tokens=10)
    model.tokenizer = tiny_tokenizer(tmp_path)
    end = model.tokenizer.eos_token_id
    model.chunks[0].output_layer.weight.data[end] = 50 * model.chunks[0].output_layer.weight.data[end].sign()
    answers = model.generate([[n] for n in range(20)], max_new_tokens=10)
    assert any(answer[-1] == end and len(answer) < 10 for answer in answers)
    assert all(end not in answer[:-1] for answer in answers)


def test_trainer_predict_on_a_plain_trainer(tmp_path):
    import lightning.pytorch as pl

    from graftwork.data import SFTDataModule

    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    model = GPT(
        Shape(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, vocab_size=300,
              max_position_embeddings=64), dtype="fp32",
    )  # fmt: skip
    model.tokenizer = tokenizer
    model.add_adapter(PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8))
    model.generation = {"max_new_tokens": 5}
    file = tmp_path / "questions.jsonl"
    file.write_text('{"input": "a warm film", "output": "positive"}\n{"input": "dull"}\n{"input": "slow and long"}\n')
    data = SFTDataModule(predict=str(file), seq_length=40, micro_batch_size=2, global_batch_size=2,
                         cache_dir=str(tmp_path))  # fmt: skip
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    answers = [row for batch in trainer.predict(model, datamodule=data) for row in batch]
    assert [row["input"] for row in answers] == ["a warm film", "dull", "slow and long"]
    assert [row.get("expected") for row in answers] == ["positive", None, None] and "expected" not in answers[1]
    virtual = model.prompt_layout.ids("ptuning")
    again = model.generate([virtual + tokenizer("dull")["input_ids"]], max_new_tokens=5)
    assert tokenizer.decode(again[0], skip_special_tokens=True).strip() == answers[1]["output"]


def _answers_in_layout(rank: int, world: int, directory: str, sizes: dict[str, int], scattered: bool):
    parallel.initialize(replace(layout_of(**sizes), sequence_parallel=scattered))
    model = GPT(shape_from_hf(read_config(Path(directory))), directory, dtype="fp32")
    model.configure_model()
    assert model.config.sequence_parallel == scattered
    attach(model)
    virtual = model.prompt_layout.ids("ptuning")
    asked = [virtual + prompt for prompt in prompts()]
    greedy = model.generate(asked, max_new_tokens=8, stop_ids=[7])
    sampled = model.generate(asked, max_new_tokens=4, stop_ids=[7], temperature=1.0, seed=2)
    fresh = model.generate(asked[:2], max_new_tokens=4, stop_ids=[], temperature=1.0)
    parallel.destroy()
    return greedy, sampled, fresh


@pytest.mark.processes
@pytest.mark.parametrize(
    "sizes, scattered",
    [({"tensor": 2}, False), ({"tensor": 2}, True), ({"pipeline": 2}, False), ({"context": 2}, False)],
    ids=["tp2", "tp2-sp", "pp2", "cp2"],
)
def test_layouts_give_one_processs_answers_on_every_rank(tmp_path, sizes, scattered):
    directory = str(make_tiny("llama", tmp_path / "model"))
    alone = _answers_in_layout(0, 1, directory, {}, False)
    ranks = run_ranks(_answers_in_layout, 2, directory, sizes, scattered)
    assert ranks[0] == ranks[1], "a drawn seed is shared too"
    assert ranks[0][:2] == alone[:2]
