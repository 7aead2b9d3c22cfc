"""``nemorun graft VERB``: importing this module (NeMo Run's entry point does) registers verbs and factories.

Here belongs what is typed and printed. What a verb does stands in ``training`` and ``inference``.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name

import nemo_run as run

NAMESPACE = "graft"

HELP = {
    "graftwork.training:finetune": """Train a base model, or a stack of adapters on it.

    nemorun graft finetune --factory smollm2_135m 'peft=[lora(dim=16),ptuning]' data.train=train.jsonl --yes

    Any field of the recipe is an override: trainer.max_steps=60, optim.lr=1e-3, 'peft[0].layers=[0,1]', peft=None for
    full fine-tuning. --dryrun prints every field.""",
    "graftwork.inference:generate": """Answer prompts with a base model and maybe an adapter.

    nemorun graft generate base=smollm2_135m adapter=runs/default/adapter 'prompts=["Hello"]'""",
    "graftwork.inference:evaluate": """Loss, exact match and closed-set accuracy on rows with known answers.

    nemorun graft evaluate base=smollm2_135m adapter=runs/default/adapter data=test.jsonl baseline=True""",
}
"""Every verb by the place where it stands, with its help; a verb is imported only where the command line names it."""


def register(arguments: Sequence[str]) -> None:
    """Register verbs and factories for a process with these ``arguments``.

    Help and the verbs beside the one that is asked for need names only: what they stand for takes seconds to import.
    """
    asked = [place for place in HELP if _is_asked(_name(place), arguments)]
    if asked:
        from graftwork.cli import context, factories

        factories.register()
    for place, words in HELP.items():
        if place in asked:
            run.cli.entrypoint(resolve_name(place), namespace=NAMESPACE, help=words, run_ctx_cls=context.GraftContext)
        else:
            run.cli.entrypoint(_unread(_name(place)), namespace=NAMESPACE, help=words)


def _is_asked(verb: str, arguments: Sequence[str]) -> bool:
    return Path(arguments[0]).name != "nemorun" or verb in arguments[2:]


def _name(place: str) -> str:
    return place.rpartition(":")[2]


def _unread(name: str) -> Callable[[], None]:
    def verb() -> None:
        raise NotImplementedError(name)

    verb.__name__ = verb.__qualname__ = name
    return verb


register(sys.argv)
