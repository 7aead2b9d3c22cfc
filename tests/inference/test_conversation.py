"""Conversations: what is put to the model is what its template says, and the pieces join to the answer."""

import json

import pytest

from graftwork.data.schema import Place, parse_row
from graftwork.errors import ConfigError, DataError
from graftwork.inference import generate
from graftwork.inference.chat import Adapters, Session
from graftwork.inference.conversation import Conversation, Growing
from graftwork.models import load
from graftwork.peft import IA3, LoRA, PTuning
from tests.contracts.methods import shake
from tests.helpers.tiny_tokenizer import tiny_tokenizer

NEW = 6
WARM = "a warm film"


class Shown:
    """A screen that remembers; ``patience``: pieces until the user has enough."""

    width = 80

    def __init__(self, patience: int = 10**9) -> None:
        self.pieces, self.notes, self.answers, self.patience = [], [], 0, patience

    def piece(self, text: str) -> None:
        self.pieces.append(text)
        if len(self.pieces) >= self.patience:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.answers += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


def said(model, messages) -> str:
    """What the model says next, by the tokenizer's own rendering and nothing of a conversation's."""
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    [ids] = model.generate([model.tokenizer(text, add_special_tokens=False)["input_ids"]], NEW)
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def adapters(model, tmp_path):
    """Two directories, of a LoRA and of an IA3, that change what the model says; it has none of them."""
    paths = []
    for transform in (LoRA(dim=4), IA3()):
        model.add_adapter(transform)
        shake(model, 0.3)
        paths.append(str(model.save_adapters(tmp_path / transform.name, verify=False)))
        model.delete_adapter(transform.name)
    return paths


def test_every_question_follows_what_was_said_and_the_pieces_join(model):
    talk, pieces = Conversation(model, max_new_tokens=NEW), []
    talk.instruct("be kind")
    first = talk.ask(WARM, pieces.append)
    history = [{"role": "system", "content": "be kind"}, user(WARM)]
    assert first.text == said(model, history) == "".join(pieces) and first.whole and not first.dropped
    assert len(pieces) == NEW + 1, "a piece a token, and the rest"
    second = talk.ask("and a dull one", pieces.append)
    history += [assistant(first.text), user("and a dull one")]
    assert second.text == said(model, history) != said(model, history[-1:])
    assert talk.messages == [*history, assistant(second.text)]
    talk.reset()
    assert talk.ask(WARM, pieces.append).text == first.text


def test_characters_of_several_tokens_are_told_whole(model):
    text = "né 漢字 🙂 end"
    ids = model.tokenizer(text)["input_ids"]
    growing = Growing(model.tokenizer)
    pieces = [growing.add(token) for token in ids]
    assert "".join([*pieces, growing.rest()]) == text
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces and "🙂" in "".join(pieces)
    growing = Growing(model.tokenizer)
    assert [growing.add(token) for token in model.tokenizer("🙂")["input_ids"][:2]] == ["", ""]
    assert "\ufffd" in growing.rest(), "a character that the model never ends"


def test_an_interrupted_answer_counts_as_far_as_it_came(model):
    talk = Conversation(model, max_new_tokens=NEW)
    whole = talk.ask(WARM, Shown().piece).text
    talk.reset()
    screen = Shown(patience=3)
    reply = talk.ask(WARM, screen.piece)
    assert not reply.whole and whole.startswith(reply.text) and len(reply.text) < len(whole)
    assert talk.messages == [user(WARM), assistant(reply.text)] and "".join(screen.pieces) == reply.text


def test_the_oldest_turns_are_left_out_of_a_full_context_and_said_so(model):
    talk, screen = Conversation(model, max_new_tokens=NEW), Shown()
    session = Session(talk, Adapters(model, []), screen)
    questions = [f"number {n}: what is the capital of France?" for n in range(4)]
    for question in questions:
        session.take(question)
    assert any("the context of 128 tokens is full: the oldest 2 turns" in note for note in screen.notes)
    assert [turn["content"] for turn in talk.messages[::2]] == questions, "what was said is all there"
    kept = talk.messages[talk._start : -1]
    assert talk._start > 0 and talk.messages[-1] == assistant(said(model, kept))
    with pytest.raises(ConfigError, match=r"the question has \d+ tokens, but the model's context is 128; shorten it"):
        talk.ask("much " * 200, screen.piece)
    assert len(talk.messages) == 8, "a question that cannot be put was not said"


def test_without_a_chat_template_questions_are_put_alone_by_the_adapters_own(checkpoint, model, tmp_path):
    template = "Review: {input}\nSentiment:"
    model.add_adapter(PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8))
    model.stack.remember_prompt_format({"prompt_template": template, "answer_template": " {output}"})
    asked = {"prompts": [WARM], "max_new_tokens": NEW, "dtype": "fp32"}
    model.save_adapters(tmp_path / "adapter", verify=False)
    [right] = generate(str(checkpoint), adapter=str(tmp_path / "adapter"), **asked)
    talk = Conversation(model, max_new_tokens=NEW)
    for _ in range(2):
        assert talk.ask(WARM, Shown().piece).text == right["output"]
    with pytest.raises(ConfigError, match="no place for a system message.*Review"):
        talk.instruct("be kind")
    tiny_tokenizer(tmp_path / "plain", 300, chat_template=None)
    model.delete_adapter("ptuning")
    model.tokenizer.chat_template = None
    [bare] = generate(str(checkpoint), **asked)
    assert talk.template == "{input}" and talk.ask(WARM, Shown().piece).text == bare["output"]


def test_adapters_are_chosen_and_compared_with_the_base(checkpoint, model, adapters):
    history, screen = [user(WARM)], Shown()
    base, answers = said(model, history), {}
    talk = Conversation(model, max_new_tokens=NEW)
    session = Session(talk, Adapters(model, adapters), screen)
    for name in ("lora", "ia3", "none"):
        session.take(f"/adapter {name}")
        session.take("/reset")
        session.take(WARM)
        answers[name] = talk.messages[-1]["content"]
        session.take("/compare")
        shown = " ".join(screen.notes[-1].split())
        assert all(word in shown for word in (base + " " + answers[name]).split()), shown
    assert answers["none"] == base and len(set(answers.values())) == 3
    fresh = load(checkpoint, dtype="fp32")
    fresh.load_adapters(adapters[1])
    assert answers["ia3"] == said(fresh, history)
    with pytest.raises(ConfigError, match="no adapter is called 'lara'; did you mean 'lora'"):
        session.take("/adapter lara")


def test_directories_of_like_names_go_by_their_paths(model, adapters, tmp_path):
    model.add_adapter(LoRA(dim=2))
    other = str(model.save_adapters(tmp_path / "other", verify=False))
    model.delete_adapter("lora")
    found = Adapters(model, [adapters[0], other, adapters[1]])
    assert found.names == [adapters[0], other, "ia3", "none"] and found.chosen == adapters[0]
    found.choose(other)
    assert model.adapters["lora"].dim == 2


def test_a_transcript_is_a_row_to_learn_from(model, tmp_path):
    talk = Conversation(model, max_new_tokens=NEW)
    session = Session(talk, Adapters(model, []), Shown())
    with pytest.raises(ConfigError, match="nothing was said yet"):
        session.take("/save talk.jsonl")
    session.take("/system be kind")
    session.take(WARM)
    session.take(f"/save {tmp_path / 'talk.jsonl'}")
    [line] = (tmp_path / "talk.jsonl").read_text().splitlines()
    assert json.loads(line) == {"messages": talk.messages} and len(talk.messages) == 3
    parse_row(json.loads(line), Place("talk.jsonl", "line", 1), answered=True)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]


def test_commands(model):
    screen = Shown()
    session = Session(Conversation(model, max_new_tokens=NEW), Adapters(model, []), screen)
    with pytest.raises(ConfigError) as raised:
        session.take("/hello there")
    valid = "/adapter, /compare, /system, /reset, /save, /help, /quit"
    assert str(raised.value) == f"there is no command '/hello'; valid: {valid}."
    assert session.take("/help") and all(name in screen.notes[-1] for name in valid.split(", "))
    assert session.take("  ") and not session.take(" /quit ") and not screen.answers
    with pytest.raises(ConfigError, match="nothing was asked yet"):
        session.take("/compare")


def test_a_refusal_of_the_chat_template_leaves_the_conversation(model):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model.tokenizer.chat_template = template + model.tokenizer.chat_template
    talk = Conversation(model, max_new_tokens=NEW)
    talk.instruct("be kind")
    with pytest.raises(DataError, match="chat template refuses the messages: no system"):
        talk.ask(WARM, Shown().piece)
    talk.instruct(None)
    assert talk.ask(WARM, Shown().piece).whole and len(talk.messages) == 2
