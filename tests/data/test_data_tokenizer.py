"""Pieces join exactly, for byte-level and for SentencePiece-like tokenizers; fingerprints follow what matters."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import graftwork
from graftwork.data.tokenizer import TextEncoder, fingerprint, load_tokenizer
from graftwork.errors import ConfigError, DataError
from tests.helpers.tiny_tokenizer import CORPUS, tiny_tokenizer


@pytest.fixture(scope="module")
def metaspace():
    """Puts a space before any text, as Llama 1 and 2 and T5 do."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator([*CORPUS, "\n"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("name", ["tokenizer", "metaspace"])
@pytest.mark.parametrize("rest", [" positive", "positive", " the end.", ", and"])
def test_prompt_and_answer_join_exactly(request, name, rest):
    tokenizer = request.getfixturevalue(name)
    text = TextEncoder(tokenizer)
    joined = text.starting(["The movie"])[0] + text.continuing([rest])[0]
    assert tokenizer.decode(joined) == "The movie" + rest


@pytest.mark.fault(
    "a SentencePiece tokenizer puts a second space between prompt and answer",
    "a continuation is tokenised behind an anchor; joined ids decode to the joined text",
)
def test_naive_joining_would_add_a_space(metaspace):
    text = TextEncoder(metaspace)
    joined = text.starting(["The movie"])[0] + text.starting([", and"])[0]
    assert metaspace.decode(joined) != "The movie, and"
    whole = metaspace("The movie positive", add_special_tokens=False).input_ids
    assert text.starting(["The movie"])[0] + text.continuing([" positive"])[0] == whole


def test_bos_follows_the_tokenizer_unless_told(tokenizer, bos_tokenizer):
    assert not TextEncoder(tokenizer).add_bos
    assert TextEncoder(bos_tokenizer).add_bos
    assert TextEncoder(tokenizer, add_bos=True).add_bos
    assert not TextEncoder(bos_tokenizer, add_bos=False).add_bos


def test_missing_special_tokens(metaspace, tokenizer):
    with pytest.raises(ConfigError, match="no bos token; set add_bos=False"):
        TextEncoder(metaspace, add_bos=True)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="no eos token; set add_eos=False"):
        TextEncoder(bare)
    assert TextEncoder(bare, add_eos=False).pad == 0


def test_fingerprint(tmp_path, tokenizer):
    same = load_tokenizer(tokenizer.name_or_path or str(_saved(tokenizer, tmp_path / "a")))
    assert fingerprint(same) == fingerprint(tokenizer)
    same(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves padding and truncation switched on
    assert fingerprint(same) == fingerprint(tokenizer)
    same.chat_template = "other"
    assert fingerprint(same) != fingerprint(tokenizer)
    assert fingerprint(tiny_tokenizer(tmp_path / "b", vocab_size=301)) != fingerprint(tokenizer)


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer can be read from .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def _saved(tokenizer, path):
    tokenizer.save_pretrained(str(path))
    return path


@pytest.mark.fault(
    "a tokenizer from a stranger brings Python code that runs when it is loaded",
    "code beside a tokenizer is never run; one that needs it is refused",
)
def test_code_beside_a_tokenizer_never_runs(tmp_path, monkeypatch):
    tiny_tokenizer(tmp_path / "foreign")
    ran = tmp_path / "ran"
    (tmp_path / "foreign" / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    file = tmp_path / "foreign" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, "tokenizer_class": "Mine"})
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    with suppress(DataError):
        load_tokenizer(str(tmp_path / "foreign"))
    assert not ran.exists()


def test_nobody_trusts_remote_code():
    package = Path(graftwork.__file__).parent
    calls = [
        line.strip()
        for file in package.rglob("*.py")
        for line in file.read_text().splitlines()
        if "trust_remote" in line
    ]
    assert calls and all("trust_remote_code=False" in line for line in calls)
