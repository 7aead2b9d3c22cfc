"""How the result of a run is used, served and made again: commands as they are typed."""

import shlex
from collections.abc import Sequence
from html import escape

from lightning.pytorch import LightningModule

from graftwork.models.base import Model
from graftwork.models.cards import ways_of
from graftwork.models.exchange import loading
from graftwork.peft.artifact.card import Way
from graftwork.training.summary import Summary


def base_of(module: LightningModule) -> str:
    """Return what the base of a model is called."""
    return module.checkpoint or loading.RANDOM if isinstance(module, Model) else type(module).__name__


def usage_of(module: LightningModule, place: str | None) -> list[Way]:
    """Return how to ask, judge, merge and load what a run has written to ``place``, on this rank alone."""
    if place is None or not isinstance(module, Model):
        return []
    if not module.adapters:
        return [*_verbs(f"base={place}"), *loading.merged(place, module.seq2seq)]
    if module.checkpoint is None:
        return ways_of(place)
    verbs = _verbs(f"base={module.checkpoint}", f"adapter={place}")
    if all(adapter.mergeable for adapter in module.stack.adapters()):
        verbs.append(_verb("Merge it into its base", "merge", f"adapter={place}", f"output={place}-merged"))
    return [*verbs, *ways_of(place)]


def again_of(made: Summary, directory: str, recipe_text: str | None, adapters: bool) -> Way:
    """Return how to train the same once more, beside the run."""
    place = made["adapter_path"]
    if recipe_text is None or place is None or not adapters:
        why = f"no recipe stands beside it: run the same command or script with resume=False and seed={made['seed']}"
        return Way("From a recipe", why_not=why)
    there = f"trainer.default_root_dir={directory}-again"
    return _verb("From its recipe", "finetune", "--from-adapter", place, there, "--yes")


def blocks(ways: Sequence[Way]) -> str:
    """Return the ways as HTML."""
    return "".join(f"<h3>{escape(way.where)}</h3>{_code(way)}" for way in ways)


def _code(way: Way) -> str:
    code = "".join(f"<pre>{escape(text)}</pre>" for _, text in way.blocks)
    return code or f"<p>No: {escape(way.why_not)}.</p>"


def _verbs(*model: str) -> list[Way]:
    baseline = ["baseline=True"] if len(model) > 1 else []
    return [
        _verb("Ask it", "generate", *model, 'prompts=["Your question"]'),
        _verb("Judge it", "evaluate", *model, "data=test.jsonl", *baseline),
    ]


def _verb(what: str, *words: str) -> Way:
    return Way(what, [("sh", shlex.join(["nemorun", "graft", *words]))])
