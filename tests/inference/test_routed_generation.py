"""Prompts of one call are answered by different adapters; oracle: a call with those adapters alone."""

import pytest

from graftwork.batch import Questions
from graftwork.errors import ConfigError, MatchError
from graftwork.models import GPT
from graftwork.peft import IA3, CanonicalAdapter, LoRA
from graftwork.ways import Named, way
from tests.contracts.methods import make, shake, tokens

PROMPTS = [ids[: 4 + i].tolist() for i, ids in enumerate(tokens(rows=5, length=9))]
SENT: list[Named] = ["lora", None, ["ia3", "bottleneck"], "second", ["lora", "ia3"]]
ANSWER = {"max_new_tokens": 12, "stop_ids": []}


@pytest.fixture(scope="module")
def model() -> GPT:
    made = make()
    made.add_adapter([LoRA("lora", dim=4), IA3("ia3"), CanonicalAdapter("bottleneck", dim=6), LoRA("second", dim=2)])
    shake(made)
    return made


def alone(model: GPT, prompt: list[int], named: Named) -> list[int]:
    """The answer of some adapters while the others are switched off."""
    for name in model.adapters:
        for adapter in model.stack.adapters(name):
            adapter.enabled = name in way(named)
    answer = model.generate([prompt], **ANSWER)[0]
    for adapter in model.stack.adapters():
        adapter.enabled = True
    return answer


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_prompt_is_answered_by_its_own_adapters(model: GPT, use_cache: bool) -> None:
    wanted = [alone(model, prompt, named) for prompt, named in zip(PROMPTS, SENT)]
    assert model.generate(PROMPTS, adapter=SENT, use_cache=use_cache, **ANSWER) == wanted
    assert model.generate(PROMPTS, use_cache=use_cache, **ANSWER) != wanted
    assert len({tuple(answer) for answer in wanted}) == len(wanted)


def test_questions_know_who_answers_them(model: GPT) -> None:
    model.tokenizer = Letters()
    asked = Questions(PROMPTS, ["?"] * 5, [None] * 5, ways=[None, *(way(named) for named in SENT[1:])])
    everyone = list(model.adapters)
    wanted = model.generate(PROMPTS, adapter=[everyone, *SENT[1:]], **ANSWER)
    assert [answer["output"] for answer in model.answer_batch(asked, **ANSWER)] == Letters().batch_decode(wanted)


def test_an_unknown_adapter_is_refused_before_the_first_token(model: GPT) -> None:
    with pytest.raises(MatchError, match="no adapter 'lorra'; .*'lora'"):
        model.generate(PROMPTS[:2], adapter=["lora", "lorra"], **ANSWER)


@pytest.mark.parametrize("adapter", ["lora", ["lora"], []])
def test_one_entry_for_each_prompt(model: GPT, adapter: list[Named]) -> None:
    with pytest.raises(ConfigError, match="a list with the adapters of each of the 5 prompts"):
        model.generate(PROMPTS, adapter=adapter, **ANSWER)


class Letters:
    """A tokenizer that writes ids as numbers."""

    eos_token_id = None

    def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]
