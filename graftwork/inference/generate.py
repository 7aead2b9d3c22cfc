"""generate: a model's answers to prompts from the command line or from a file."""

from dataclasses import replace
from typing import Optional, Unpack

from graftwork.batch import Questions
from graftwork.data import SFTDataModule
from graftwork.errors import ConfigError
from graftwork.inference.examples import Examples
from graftwork.inference.output import write_jsonl
from graftwork.models import Model, load
from graftwork.models.generation.answers import Answer
from graftwork.models.generation.decoding import Options


def generate(
    base: str,
    prompts: Optional[list[str]] = None,
    file: Optional[str] = None,
    adapter: Optional[str] = None,
    prompt_template: Optional[str] = None,
    task: Optional[str] = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: Optional[int] = None,
    limit: Optional[int] = None,
    dtype: Optional[str] = "auto",
    output: Optional[str] = None,
    row_layout: Optional[str] = None,
) -> list[Answer]:
    """Answer prompts, or rows of a file: ``input``, ``output`` and, where it is known, ``expected`` of each.

    Args:
        base: A checkpoint directory, a registered model or a name on Hugging Face's hub.
        prompts: Texts to answer.
        file: File or directory of rows to answer.
        adapter: Directory of an adapter; without one the base answers.
        prompt_template: How a prompt is put; default the one the adapter was trained with, else ``{input}``.
        task: Names the prompt of a multi-task adapter for ``prompts``; rows have a field of that name.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token, more draws.
        top_p: Draw from the likeliest tokens of this share only.
        seed: Makes the draws repeatable.
        limit: Most rows of the file.
        dtype: ``bf16``, ``fp32`` or ``auto``, the checkpoint's.
        output: JSONL file to write.
        row_layout: Name of the layout the rows have; default their columns tell.
    """
    if (prompts is None) == (file is None):
        raise ConfigError("give either prompts or a file to generate from.")
    examples = _questions(prompts or [], file, prompt_template, task, limit, row_layout)
    model = load(base, dtype=dtype)
    if adapter is not None:
        model.load_adapters(adapter)
    answers = answer(model, examples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if output is not None:
        write_jsonl(output, answers)
    return answers


def _questions(
    prompts: list[str],
    file: str | None,
    prompt_template: str | None,
    task: str | None,
    limit: int | None,
    row_layout: str | None,
) -> Examples:
    if file is None:
        return Examples.from_prompts(prompts, prompt_template, task)
    return Examples.from_file(file, prompt_template, limit=limit, answered=False, row_layout=row_layout)


def answer(model: Model, examples: Examples, **options: Unpack[Options]) -> list[Answer]:
    """Return ``input``, ``output`` and, where it is known, ``expected`` of every row; options as in model.generate."""
    model.configure_model()
    asked = examples.asked(model)
    questions = Questions(
        prompts=[tokens for tokens, _, _ in asked],
        inputs=[question for _, question, _ in asked],
        outputs=[right for _, _, right in asked],
        ways=[row.way for _, row in examples.rows],
    )
    return model.answer_batch(questions, **options)


def sample_answers(
    model: Model, data: SFTDataModule | Examples, count: int = 5, max_new_tokens: int = 32
) -> list[Answer]:
    """Answer the first ``count`` rows of a data module (test, else validation) greedily, as the model is now."""
    examples = data if isinstance(data, Examples) else Examples.from_data(data, limit=count)
    return answer(model, replace(examples, rows=examples.rows[:count]), max_new_tokens=max_new_tokens)
