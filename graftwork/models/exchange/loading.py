"""How an adapter, an export or a merged model is loaded: the lines of its card, for every place that can."""

import re
import shlex
from collections.abc import Mapping

from graftwork.models.weights.hub import REGISTERED
from graftwork.peft.artifact.card import LONGEST, Way

RANDOM = "random weights"
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
"""Names that double quotes leave as they are."""
HERE, PEFT, VLLM = "Here", "Hugging Face PEFT", "vLLM"


def here(base: str, place: str) -> Way:
    """Return how an adapter, of ours or exported, in the directory ``place`` is loaded here."""
    if base == RANDOM:
        return Way(HERE, why_not="it was trained on random weights, which no checkpoint holds")
    lines = [
        "from graftwork import models",
        "",
        f"model = models.load({_shown(base, 'path/to/base')!r})",
        f"model.load_adapters({_shown(place, 'path/to/adapter')!r})",
        "model.freeze()",
    ]
    return Way(HERE, [("python", "\n".join(lines))])


def peft(base: str, place: str, seq2seq: bool) -> tuple[str, str]:
    """Return the block that loads an exported adapter in Hugging Face PEFT."""
    named = _shown(base, "path/to/base")
    kind = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    known = named in REGISTERED or named.endswith(".gguf")
    lines = [
        "import peft",
        f"from transformers import {kind}",
        *(["", "from graftwork.models.weights.hub import resolve"] if known else []),
        "",
        f"base = {kind}.from_pretrained({f'resolve({named!r})' if known else repr(named)})",
        f"model = peft.PeftModel.from_pretrained(base, {_shown(place, 'path/to/adapter')!r})",
    ]
    return "python", "\n".join(lines)


def vllm(base: str, place: str, name: str, rank: object) -> tuple[str, str]:
    """Return the command that serves an adapter that was exported for vLLM."""
    base, place = (shlex.quote(_shown(one, "path/to/it")) for one in (base, place))
    return "sh", f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place}"


def export(place: str, output: str, name: str, alone: bool, for_: str) -> tuple[str, str]:
    """Return the command that exports one adapter of an artifact."""
    words = ["nemorun", "graft", "export", f"adapter={_shown(place, 'path/to/adapter')}", f"output={output}"]
    words += [] if for_ == "peft" else [f"for_={for_}"]
    command = " ".join(map(shlex.quote, words))
    if alone:
        return "sh", command
    chosen = f"names=['{name}']"
    return "sh", f'{command} "{chosen}"' if _PLAIN.fullmatch(name) else f"{command} {shlex.quote(chosen)}"


def merged(place: str, seq2seq: bool) -> list[Way]:
    """Return how a merged model in the directory ``place`` is loaded."""
    named = _shown(place, "path/to/model")
    kind = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    theirs = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({named!r})"
    ways = [
        Way(HERE, [("python", f"from graftwork import models\n\nmodel = models.load({named!r})")]),
        Way("transformers", [("python", theirs)]),
    ]
    return ways if seq2seq else [*ways, Way(VLLM, [("sh", f"vllm serve {shlex.quote(named)}")])]


def exported(config: Mapping[str, object], base: str, place: str, name: str, for_: str) -> list[Way]:
    """Return how an exported adapter in the directory ``place`` is loaded."""
    ways = [here(base, place), Way(PEFT, [peft(base, place, config["task_type"] == "SEQ_2_SEQ_LM")])]
    return [*ways, Way(VLLM, [vllm(base, place, name, config.get("r"))])] if for_ == "vllm" else ways


def _shown(text: str, otherwise: str) -> str:
    """Return a name that can stand in a line of code, or what stands for it."""
    return text if text.isprintable() and 0 < len(text) <= LONGEST else otherwise
