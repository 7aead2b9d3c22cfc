"""The model card beside an adapter, an export or a merged model: a header that the Hugging Face hub reads, and tables.

Whatever others have named goes in quoted: in the header as YAML strings of plain ASCII, in the text as code.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from graftwork.errors import quoted
from graftwork.peft.artifact.config import ArtifactConfig, Entry
from graftwork.peft.artifact.proof import Proof

Shapes = Mapping[str, Sequence[int]]
"""Shapes of tensors by their full names."""
GENERATES = "text-generation"
SEQ2SEQ = "text2text-generation"
LONGEST = 300
"""Characters that are shown of what others have named."""


@dataclass(frozen=True)
class DataFile:
    """A file of rows: what it was used for, its name, the SHA-256 of its bytes."""

    use: str
    name: str
    sha256: str


@dataclass(frozen=True)
class Told:
    """What whoever trains knows beside the adapters: data files, and figures ``{name: {"before": x, "after": y}}``."""

    data: Sequence[DataFile] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


NOTHING = Told()


@dataclass(frozen=True)
class Way:
    """How to load it in one place: blocks of (language, code), or the reason why it cannot be."""

    where: str
    blocks: Sequence[tuple[str, str]] = ()
    why_not: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and Markdown below it."""

    title: str
    text: str


def card(header: Mapping[str, object], title: str, sections: Iterable[Section]) -> str:
    """Return the text of a README: the header's fields (None is left out), a title, the sections that have a text."""
    lines = [f"{key}: {_yaml(value)}" for key, value in header.items() if value not in (None, [])]
    body = "\n\n".join(f"## {section.title}\n\n{section.text}" for section in sections if section.text)
    return "\n".join(["---", *lines, "---", "", f"# {title}", "", body, ""])


def adapter_card(config: ArtifactConfig, shapes: Shapes, proof: str | None, told: Told, ways: Sequence[Way]) -> str:
    """Return the card of an artifact: base, stack, data, figures, proof and how to load it."""
    methods = sorted({entry.method.lower() for entry in config.adapters})
    seq2seq = "num_decoder_layers" in config.base.shape
    return card(
        header_of(config.base.name, "graftwork", ["peft", *methods], seq2seq, "adapter"),
        f"Adapter for {code(config.base.name)}",
        [
            base_section(config.base.name, config.base.family, config.base.fingerprint),
            Section("Stack", _stack(config, shapes)),
            Section("Data", _data(config.adapters, told.data)),
            Section("Metrics", _metrics(told.metrics)),
            proof_section(proof),
            loading_section(ways),
        ],
    )


def header_of(base: str, library: str, tags: Sequence[str], seq2seq: bool, relation: str) -> dict[str, object]:
    """Return the header of a card; a base without a name has none there."""
    named = base if base.isprintable() and base != "random weights" and len(base) <= LONGEST else None
    return {
        "base_model": named,
        "base_model_relation": relation if named else None,
        "library_name": library,
        "tags": list(tags),
        "pipeline_tag": SEQ2SEQ if seq2seq else GENERATES,
    }


def base_section(name: str, family: str, fingerprint: str | None) -> Section:
    """Return which base it is."""
    printed = f", fingerprint {code(fingerprint)}" if fingerprint else ""
    return Section("Base", f"{code(name)}, a {code(family)}{printed}.")


def proof_section(text: str | None) -> Section:
    """Return the table of a proof, or that there is none."""
    if text is None:
        return Section("Proof", "None: what was written was not read back and compared.")
    proof = Proof.model_validate(json.loads(text))
    base = proof.views[0]
    rows = []
    for view in proof.views[1:]:
        pairs = zip(view.values, base.values)
        most = max(abs(a - b) for one, other in pairs for a, b in zip(one, other)) / (view.scale or 1.0)
        rows.append([code(" + ".join(view.adapters)), f"{most:.1e}", f"{proof.tolerance:.1e}"])
    where = ", ".join(f"{key} {value}" for key, value in proof.layout.items() if value not in (None, False, 1))
    return Section(
        "Proof",
        f"Before it was published, {len(proof.probe.prompts)} rows of random tokens were answered by what the files "
        f"say ({proof.dtype}, {code(proof.device)}{f', {where}' if where else ''}). Effect: how far logits are from "
        "the base's, relative to the largest; tolerance: how far they may be from the proof's elsewhere.\n\n"
        + table(["logits of", "effect", "tolerance"], rows)
        + "\n\n`nemorun graft verify` on this directory runs it again.",
    )


def loading_section(ways: Sequence[Way]) -> Section:
    """Return how to load it, and where it cannot be."""
    parts = []
    for way in ways:
        blocks = "\n\n".join(fenced(language, text) for language, text in way.blocks)
        parts.append(f"### {way.where}\n\n{blocks or f'Not there: {code(way.why_not)}'}")
    return Section("Load it", "\n\n".join(parts))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; cells are Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: object, limit: int = LONGEST, marks: bool = False) -> str:
    """Return any text as Markdown code on one line, with or without quotation marks."""
    shown = quoted(str(text), limit, bare=not marks)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}{shown}{fence}" if len(fence) == 1 else f"{fence} {shown} {fence}"


def fenced(language: str, text: str) -> str:
    """Return a block of code."""
    fence = "`" * (1 + max(2, *(len(run) for run in re.findall("`+", text)), 0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _stack(config: ArtifactConfig, shapes: Shapes) -> str:
    rows = []
    for entry in config.adapters:
        settings = ", ".join(f"{k}={v!r}" for k, v in entry.hyperparameters.items() if v is not None)
        count = sum(prod(shape) for key, shape in shapes.items() if key.partition(".")[0] == entry.name)
        rows.append([code(f"{entry.method}({settings})", 2000), f"{count:,}"])
    steps = f"{config.step} steps" if config.step is not None else "an unknown number of steps"
    total = sum(map(prod, shapes.values()))
    heading = f"Inner to outer; {total:,} values in fp32 ({_size(4 * total)}), trained for {steps}."
    return heading + "\n\n" + table(["adapter", "values"], rows)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _data(adapters: Sequence[Entry], files: Sequence[DataFile]) -> str:
    prompts = [a.prompt.prompt_template for a in adapters if a.prompt is not None]
    texts = [list(given.values()) if isinstance(given, dict) else [given] for given in prompts if given is not None]
    asked = ", ".join(code(one, 2000, marks=True) for one in dict.fromkeys(one for given in texts for one in given))
    rows = [[one.use, code(one.name), code(one.sha256)] for one in files]
    parts = [
        f"Trained on the prompt {asked}." if asked else "",
        table(["for", "file", "SHA-256"], rows) if rows else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [code(name), *(f"{found[when]:.4g}" if when in found else "" for when in ("before", "after"))]
        for name, found in metrics.items()
    ]
    return table(["", "before", "after"], rows) if rows else ""


def _yaml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    shown = "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08X}" for c in str(value))
    return f'"{shown}"'
