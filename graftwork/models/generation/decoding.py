"""Token-by-token generation: prompts of different lengths together, finished ones leave."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypedDict

from graftwork.errors import ConfigError, quoted
from graftwork.models.generation.protocol import CausalModel
from graftwork.models.generation.reading import Reader, heads, reader
from graftwork.models.generation.sampling import Sampler
from graftwork.models.generation.scoring import check_tokens, evaluating, one_piece
from graftwork.routes import Routes
from graftwork.ways import Named, Way, way

Each = Callable[[int, int], None]
"""Hears every token as it is chosen: the number of its prompt, and its id. What it raises ends the generation."""


class Decoding(TypedDict, total=False):
    """How tokens are chosen and when a prompt is answered; what is left out keeps the default of ``generate``."""

    temperature: float
    top_p: float
    seed: int | None
    stop_ids: list[int] | None
    use_cache: bool
    batch_size: int
    adapter: Sequence[Named] | None
    each: Each | None


class Options(Decoding, total=False):
    """All options of ``generate``."""

    max_new_tokens: int


def generate(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: list[int] | None = None,
    use_cache: bool = True,
    batch_size: int = 16,
    adapter: Sequence[Named] | None = None,
    each: Each | None = None,
) -> list[list[int]]:
    """Return the tokens that follow each prompt of token ids (virtual ids included), up to and with a stop token.

    Temperature 0 is greedy; otherwise ``seed`` makes the draws repeatable. ``stop_ids`` None is the tokenizer's end of
    sequence, [] never stops. ``adapter`` names for each prompt the adapters that answer it (one, several, or None for
    the base alone); left out, every adapter answers every prompt. All ranks call it with the same prompts (of their
    data-parallel group) and get the same answers; ``each`` hears a token as soon as it is chosen. The cache is exact;
    pipeline, context and sequence parallelism always go without. Raises ConfigError for an unknown token id or a prompt
    that leaves too little of the model's context.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, but it must be at least 1.")
    sampler = Sampler(temperature, top_p, seed)
    ways = _ways(adapter, len(prompts))
    with evaluating(model), model.routed(_routes(ways)):  # all names are checked before the first token
        check_tokens(model, prompts, max_new_tokens)
        stops = _end_of_sequence(model) if stop_ids is None else set(stop_ids)
        cached = use_cache and one_piece(model)
        answers: dict[int, list[int]] = {}
        for numbers in _groups(prompts, batch_size, None if model.seq2seq else max_new_tokens if cached else 0):
            asked = [prompts[number] for number in numbers]
            begun = zip(numbers, heads(model, asked), strict=True)
            rows = [_Row(number, head, max_new_tokens, stops, ways[number]) for number, head in begun]
            with reader(model, asked, max(row.limit for row in rows), cached) as rest:
                _decode(model, rows, rest, sampler, each)
            answers.update((row.number, row.answer) for row in rows)
    return [answers[number] for number in range(len(prompts))]


def _ways(adapter: Sequence[Named] | None, prompts: int) -> list[Way]:
    if adapter is None:
        return [None] * prompts
    if isinstance(adapter, str) or len(adapter) != prompts:
        raise ConfigError(
            f"adapter must be a list with the adapters of each of the {prompts} prompts (a name, a list of names, or "
            f"None for the base); got {quoted(adapter)}."
        )
    return [way(named) for named in adapter]


def _routes(ways: Iterable[Way]) -> Routes | None:
    given = list(ways)
    return None if all(one is None for one in given) else Routes.of_rows(given)


def _end_of_sequence(model: CausalModel) -> set[int]:
    end = model.tokenizer.eos_token_id
    return set() if end is None else {end}


class _Row:
    """What stands before one prompt's answer, and the answer so far."""

    def __init__(self, number: int, head: list[int], room: int, stops: set[int], way: Way) -> None:
        self.number, self.tokens, self.stops, self.way = number, list(head), stops, way
        self.start, self.limit = len(head), len(head) + room

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.start :]

    @property
    def finished(self) -> bool:
        return len(self.tokens) == self.limit or (len(self.tokens) > self.start and self.tokens[-1] in self.stops)


def _groups(prompts: Sequence[Sequence[int]], size: int, gap: int | None) -> Iterator[list[int]]:
    """Yield prompt numbers, shortest first, at most ``size`` together and no two neighbours further apart than ``gap``.

    What is longer than a group's shortest prompt is read token by token beside the others' answers; over a gap longer
    than an answer, starting anew takes fewer steps. None: an encoder reads prompts whole, however long.
    """
    group: list[int] = []
    for number in sorted(range(len(prompts)), key=lambda n: len(prompts[n])):
        apart = gap is not None and bool(group) and len(prompts[number]) - len(prompts[group[-1]]) > gap
        if len(group) == size or apart:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _decode(model: CausalModel, rows: list[_Row], reader: Reader, sampler: Sampler, each: Each | None) -> None:
    """Advance all rows one position at a time: a row still inside its prompt reads on, the others get a new token."""
    # The shortest prompt is read at once. From then on every row is ``width`` tokens long in the reader's eyes, so no
    # padding ever enters the cache; a longer prompt catches up while the others' answers grow.
    width = min(row.start for row in rows)
    while rows:
        with model.routed(_routes(row.way for row in rows)):
            logits = reader.read([row.tokens[:width] for row in rows])
        asking = [i for i, row in enumerate(rows) if len(row.tokens) == width]
        if asking:
            chosen = sampler.choose(logits[asking], [rows[i].number for i in asking])
            for i, token in zip(asking, chosen):
                rows[i].tokens.append(token)
                if each is not None:
                    each(rows[i].number, token)
        going = [i for i, row in enumerate(rows) if not row.finished]
        if going and len(going) < len(rows):
            reader.keep(going)
        rows = [rows[i] for i in going]
        width += 1
