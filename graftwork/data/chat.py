"""Conversations: rendered by the tokenizer's own chat template, learned on the assistant's turns only."""

from jinja2.exceptions import TemplateError

from graftwork.data.schema import Chat, Place
from graftwork.data.template import Piece
from graftwork.data.tokenizer import Tokenizer
from graftwork.errors import DataError

_INPUT, _OUTPUT = "graftworkinput", "graftworkoutput"
"""Words that stand for what a row says while a chat template is rendered."""
_DAY = "26 Jul 2024"
"""What LLaMA's templates say is today, unless they are told: a template of all rows must not change over night."""


def learned_pieces(tokenizer: Tokenizer, chat: Chat, place: Place, add_eos: bool) -> list[Piece]:
    """Text of the conversation up to the last assistant turn; every assistant turn with its end token is learned.

    One of weight 0 is read only.
    A turn is found as the text that rendering one message more adds; raises DataError where the template rewrites
    earlier text, because no such turn exists then.
    """
    pieces: list[Piece] = []
    done = ""
    for turn in (i for i, message in enumerate(chat.messages) if message.role == "assistant"):
        before = render(tokenizer, chat, place, turn, generation=True)
        after = render(tokenizer, chat, place, turn + 1, generation=False)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                f"{place}: the chat template renders message {turn + 1} differently once it stands in a longer "
                "conversation, so its answer tokens cannot be told; use a template that only appends, "
                "or rows with 'input' and 'output'."
            )
        answer, rest = _split_end(after[len(before) :], tokenizer.eos_token)
        pieces += [Piece(before[len(done) :]), Piece(answer, loss=chat.messages[turn].learned), Piece(rest)]
        done = after
    return _close(pieces, tokenizer, add_eos)


def prompt_pieces(tokenizer: Tokenizer, chat: Chat, place: Place) -> tuple[list[Piece], str | None]:
    """Text that asks for the conversation's next answer, and that answer where the last message holds it."""
    last = chat.messages[-1]
    answered = last.role == "assistant"
    count = len(chat.messages) - answered
    return [Piece(render(tokenizer, chat, place, count, generation=True))], last.content if answered else None


def row_templates(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Return the templates that put rows with ``input`` and ``output`` as the chat template puts two messages.

    None where a template says something else of each row or each day, so that no text in braces can stand for it.
    """
    told = tokenizer.chat_template or ""
    if not told or ("strftime_now" in told and "date_string" not in told):
        return None
    messages = [{"role": "user", "content": _INPUT}, {"role": "assistant", "content": _OUTPUT}]
    try:
        before, after = (
            tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=count == 1, date_string=_DAY
            )
            for count in (1, 2)
        )
    except TemplateError:
        return None
    answer = _split_end(after[len(before) :], tokenizer.eos_token)[0].removesuffix(tokenizer.eos_token or "\0")
    if not after.startswith(before) or (before.count(_INPUT), answer.count(_OUTPUT)) != (1, 1):
        return None
    return _literal(before).replace(_INPUT, "{input}"), _literal(answer).replace(_OUTPUT, "{output}")


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def question(chat: Chat) -> str:
    """What the user said last (the last message where no user speaks)."""
    said = [message.content for message in chat.messages if message.role == "user"]
    return (said or [chat.messages[-1].content])[-1]


def render(tokenizer: Tokenizer, chat: Chat, place: Place, count: int, generation: bool) -> str:
    """The first ``count`` messages as text, with the header of an answer to come where ``generation``."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{place}: the row has 'messages', but the tokenizer has no chat template; "
            "give a tokenizer that has one, or rows with 'input' and 'output'."
        )
    messages = [message.model_dump() for message in chat.messages[:count]]
    try:
        return tokenizer.apply_chat_template(
            messages, tools=chat.tools, tokenize=False, add_generation_prompt=generation
        )
    except TemplateError as error:
        raise DataError(f"{place}: the tokenizer's chat template refuses the messages: {error}.") from None


def _split_end(turn: str, end: str | None) -> tuple[str, str]:
    """Cut after the turn's end token: what the template writes behind it (a line break) is never generated."""
    at = turn.rfind(end) if end else -1
    return (turn, "") if at < 0 else (turn[: at + len(end or "")], turn[at + len(end or "") :])


def _close(pieces: list[Piece], tokenizer: Tokenizer, add_eos: bool) -> list[Piece]:
    """End with the answer, and with the end-of-sequence token where the template's own end token is another."""
    kept = pieces[:-1]
    end, end_id = tokenizer.eos_token, tokenizer.eos_token_id
    if add_eos and end is not None and end_id is not None and not kept[-1].text.endswith(end):
        kept.append(Piece(ids=(end_id,), loss=kept[-1].loss))
    return kept
