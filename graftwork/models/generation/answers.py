"""Questions to answers in words."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict, Unpack

from graftwork import parallel
from graftwork.batch import Questions
from graftwork.errors import ParallelismError
from graftwork.models.generation.decoding import Options, generate
from graftwork.models.generation.protocol import CausalModel


class Answer(TypedDict):
    """What a model says to one question, and the right answer where it is known."""

    input: str
    output: str
    expected: NotRequired[str]


def answer(model: CausalModel, asked: Questions, **options: Unpack[Options]) -> list[Answer]:
    """Return the answer to every question, of the adapters that it is put to; options as in ``generate``."""
    if any(way is not None for way in asked.ways):
        options["adapter"] = [sorted(model.adapters if way is None else way) for way in asked.ways]
    tokens = generate(model, asked.prompts, **options)
    texts = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    known: Sequence[str | None] = asked.outputs or [None] * len(texts)
    return [_answer(*row) for row in zip(asked.inputs, texts, known, strict=True)]


def refuse_spread_experts() -> None:
    """Raise ParallelismError where data-parallel ranks, each with prompts of its own, hold different experts."""
    if parallel.ep_size() > 1 and parallel.dp_size() > 1:
        raise ParallelismError(
            "prediction gives every data-parallel rank its own prompts, but experts are spread over those ranks; "
            "predict with expert_model_parallel_size=1."
        )


def _answer(asked: str, text: str, right: str | None) -> Answer:
    found = Answer(input=asked, output=text.strip())
    return found if right is None else {**found, "expected": right}
