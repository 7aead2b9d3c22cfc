"""``nemorun graft VERB``: importing this module (NeMo Run's entry point does) registers verbs and factories.

Here belongs what is typed and printed. What a verb does stands in ``training`` and ``inference``.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import nemo_run as run
from nemo_run.cli import api

from graftwork.cli import heap

NAMESPACE = "graft"

HELP = {
    "graftwork.training:finetune": """Train a base model, or a stack of adapters on it.

    nemorun graft finetune --factory smollm2_135m 'peft=[lora(dim=16),ptuning]' data.train=train.jsonl --yes

    A base without a recipe makes one of its own files: --factory "auto(base=path/to/checkpoint)".

    Any field of the recipe is an override: trainer.max_steps=60, optim.lr=1e-3, 'peft[0].layers=[0,1]', peft=None for
    full fine-tuning. --dryrun prints every field.""",
    "graftwork.inference:generate": """Answer prompts with a base model and maybe an adapter.

    nemorun graft generate base=smollm2_135m adapter=runs/default/adapter 'prompts=["Hello"]'""",
    "graftwork.cli.chat:chat": """Talk with a base model and maybe an adapter, or several to choose from.

    nemorun graft chat base=smollm2_135m adapter=runs/default/adapter
    echo "a warm film" | nemorun graft chat base=smollm2_135m adapter=runs/default/adapter

    In a pipe every line is a question, and every answer a line.""",
    "graftwork.inference:evaluate": """Loss, exact match and closed-set accuracy on rows with known answers.

    nemorun graft evaluate base=smollm2_135m adapter=runs/default/adapter data=test.jsonl baseline=True""",
    "graftwork.cli.export:export": """Write an adapter as Hugging Face PEFT or vLLM load it; no model is built.

    nemorun graft export adapter=runs/default/adapter output=peft
    nemorun graft export adapter=runs/default/adapter output=served for_=vllm""",
    "graftwork.cli.merge:merge": """Fold an adapter into its base: a Hugging Face checkpoint; no model is built.

    nemorun graft merge adapter=runs/default/adapter output=merged
    nemorun graft merge adapter=peft base=path/to/base output=merged dtype=bf16""",
    "graftwork.cli.combine:combine": """Make one adapter, or one merged model, of several adapters and weights.

    nemorun graft combine 'adapters=[runs/a/adapter,runs/b/adapter]' 'weights=[0.7,-0.3]' combine=svd output=both""",
    "graftwork.cli.verify:verify": """Run the proof that an adapter carries again: is it, here, what was trained?

    nemorun graft verify runs/default/adapter
    nemorun graft verify runs/default/adapter base=path/to/base
    nemorun graft verify runs/default/adapter against=merged client=transformers

    It may be an exported adapter or a merged model too. Exits 1 where logits differ by more than the tolerance.""",
    "graftwork.cli.profile:profile": """Describe a cluster in cluster.yaml, and try the description out.

    nemorun graft profile init
    nemorun graft profile check""",
    "graftwork.cli.plan:plan": """Tell what a run will take and what would stop it; nothing is run or downloaded.

    nemorun graft plan --factory llama2_70b 'peft=[lora]' device=H100 --fit 8xH100

    What finetune takes is taken too. Exits 2 where there are problems; output=FILE keeps the plan as JSON.""",
    "graftwork.cli.data:data": """Tell what data files hold: layout, lengths, cuts, packing, repeats, rows as learned.

    nemorun graft data train.jsonl
    nemorun graft data train.jsonl validation=test.jsonl tokenizer=path/to/tokenizer seq_length=512 output=lengths.png
    nemorun graft data --factory llama2_7b data.train=train.jsonl limit=1000 rows=5

    What finetune takes is taken too; a field of the data may leave out its 'data.'. limit: rows of a file that are
    looked at; rows: how many are shown; output: the lengths as PNG. Exits 2 where rows would stop a run.""",
    "graftwork.cli.sweep:sweep": """Train every combination of some fields' values, each in a directory of its own.

    nemorun graft sweep --factory smollm2_135m 'sweep.peft[0].dim=[8,16]' 'sweep.optim.lr=[1e-4,1e-3]' parallel=2 --yes

    What finetune takes is taken too. Runs that are finished are skipped, interrupted ones go on.""",
    "graftwork.executors.jobs:status": """Tell how an experiment is, or the newest ones when none is named.

    nemorun graft status
    nemorun graft status default""",
    "graftwork.executors.jobs:logs": """Print what an experiment has written so far, all ranks and all attempts.

    nemorun graft logs default follow=True""",
    "graftwork.executors.jobs:attach": """Show an experiment as if it had been launched here, to its end.

    nemorun graft attach default""",
    "graftwork.executors.jobs:cancel": """Cancel an experiment; a training saves its state first.

    nemorun graft cancel default""",
    "graftwork.training.leaderboard:compare": """Show finished runs beside each other, best first.

    nemorun graft compare runs/default runs/other output=runs.html""",
    "graftwork.cli.completion:completion": """Print what lets a shell complete verbs, recipes and fields: bash or zsh.

    eval "$(nemorun graft completion bash)"

    The script holds the names of this version and starts no Python: put it into a file that the shell reads.""",
}
"""Every verb by the place where it stands, with its help; a verb is imported only where the command line names it."""

CONTEXTS = {
    "graftwork.cli.chat:chat": "graftwork.cli.chat:ChatContext",
    "graftwork.cli.plan:plan": "graftwork.cli.plan:PlanContext",
    "graftwork.cli.data:data": "graftwork.cli.data:DataContext",
    "graftwork.cli.sweep:sweep": "graftwork.cli.sweep:SweepContext",
}
"""Where the context of a verb stands that does not run as it is called; the others have ``GraftContext``."""


def register(arguments: Sequence[str]) -> None:
    """Register verbs and factories for a process with these ``arguments``.

    Help and the verbs beside the one that is asked for need names only: what they stand for takes seconds to import.
    """
    asked = [place for place in HELP if _is_asked(_name(place), arguments)]
    if asked:
        from graftwork.cli import factories

        factories.register()
    for place, words in HELP.items():
        if place in asked:
            context = resolve_name(CONTEXTS.get(place, "graftwork.cli.context:GraftContext"))
            run.cli.entrypoint(resolve_name(place), namespace=NAMESPACE, help=words, run_ctx_cls=context)
        else:
            run.cli.entrypoint(_unread(_name(place)), namespace=NAMESPACE, help=words)


def _say(*words: object, **options: Any) -> None:
    """Print what NeMo Run's command line prints, without what it says first: a result may be read by a program."""
    if words != ("Configuring global options",):
        print(*words, **options)


def _is_asked(verb: str, arguments: Sequence[str]) -> bool:
    return Path(arguments[0]).name != "nemorun" or verb in arguments[2:]


def _name(place: str) -> str:
    return place.rpartition(":")[2]


def _unread(name: str) -> Callable[[], None]:
    def verb() -> None:
        raise RuntimeError(f"{name} is not imported in this process")

    verb.__name__ = verb.__qualname__ = name
    return verb


if Path(sys.argv[0]).name == "nemorun":
    heap.starting()
api.print = _say
register(sys.argv)
