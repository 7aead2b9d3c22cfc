"""Every verb of ``nemorun graft``: where it stands, what it does in a line, and examples as they are typed."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A verb; it is imported from ``place``, and so is its ``context``, only where the command line names it.

    ``trains``: it takes what ``finetune`` takes, beside its own fields.
    """

    place: str
    does: str
    examples: Sequence[str]
    more: str = ""
    context: str = "graftwork.cli.context:GraftContext"
    trains: bool = False

    @property
    def name(self) -> str:
        """The verb as it is typed."""
        return self.place.rpartition(":")[2]


_ADAPTED = "base=smollm2_135m adapter=runs/default/adapter"

VERBS = (
    Verb(
        "graftwork.training:finetune",
        "Train a base model, or a stack of adapters on it.",
        (
            "nemorun graft finetune --factory smollm2_135m 'peft=[lora(dim=16),ptuning]' data.train=train.jsonl --yes",
            'nemorun graft finetune --factory "auto(base=path/to/checkpoint)" data.train=train.jsonl --yes',
            "nemorun graft finetune --factory smollm2_135m 'peft[0].layers=[0,1]' optim.lr=1e-3 trainer.max_steps=60",
            "nemorun graft finetune --factory smollm2_135m data.train=train.jsonl peft=None --dryrun",
        ),
        "Any field of the recipe is an override, by the path that --dryrun prints.",
        trains=True,
    ),
    Verb(
        "graftwork.cli.chat:chat",
        "Talk with a base model and maybe an adapter, or several to choose from.",
        (
            f"nemorun graft chat {_ADAPTED}",
            f'echo "a warm film" | nemorun graft chat {_ADAPTED}',
        ),
        "In a pipe every line is a question, and every answer a line.",
        "graftwork.cli.chat:ChatContext",
    ),
    Verb(
        "graftwork.inference:generate",
        "Answer prompts with a base model and maybe an adapter.",
        (f"nemorun graft generate {_ADAPTED} 'prompts=[\"Hello\"]'",),
    ),
    Verb(
        "graftwork.inference:evaluate",
        "Loss, exact match and closed-set accuracy on rows with known answers.",
        (f"nemorun graft evaluate {_ADAPTED} data=test.jsonl baseline=True",),
    ),
    Verb(
        "graftwork.cli.export:export",
        "Write an adapter as Hugging Face PEFT or vLLM load it; no model is built.",
        (
            "nemorun graft export adapter=runs/default/adapter output=peft",
            "nemorun graft export adapter=runs/default/adapter output=served for_=vllm",
        ),
    ),
    Verb(
        "graftwork.cli.merge:merge",
        "Fold an adapter into its base: a Hugging Face checkpoint; no model is built.",
        (
            "nemorun graft merge adapter=runs/default/adapter output=merged",
            "nemorun graft merge adapter=peft base=path/to/base output=merged dtype=bf16",
        ),
    ),
    Verb(
        "graftwork.cli.combine:combine",
        "Make one adapter, or one merged model, of several adapters and weights.",
        (
            "nemorun graft combine \"adapters=['runs/a/adapter','runs/b/adapter']\" 'weights=[0.7,-0.3]' combine=svd "
            "rank=16 output=both",
        ),
    ),
    Verb(
        "graftwork.cli.verify:verify",
        "Run the proof that an adapter carries again: is it, here, what was trained?",
        (
            "nemorun graft verify runs/default/adapter",
            "nemorun graft verify runs/default/adapter base=path/to/base",
            "nemorun graft verify runs/default/adapter against=merged client=transformers",
        ),
        "It may be an exported adapter or a merged model too. Exits 1 where logits differ by more than the tolerance.",
    ),
    Verb(
        "graftwork.cli.profile:profile",
        "Describe a cluster in cluster.yaml, and try the description out.",
        ("nemorun graft profile init", "nemorun graft profile check"),
    ),
    Verb(
        "graftwork.cli.plan:plan",
        "Tell what a run will take and what would stop it; nothing is run or downloaded.",
        ("nemorun graft plan --factory llama2_70b 'peft=[lora]' device=H100 --fit 8xH100",),
        "What finetune takes is taken too. Exits 2 where there are problems.",
        "graftwork.cli.plan:PlanContext",
        trains=True,
    ),
    Verb(
        "graftwork.cli.data:data",
        "Tell what data files hold: layout, lengths, cuts, packing, repeats, rows as learned.",
        (
            "nemorun graft data train.jsonl",
            "nemorun graft data train.jsonl validation=test.jsonl tokenizer=path/to/tokenizer seq_length=512",
            "nemorun graft data --factory llama2_7b data.train=train.jsonl limit=1000 rows=5",
        ),
        "What finetune takes is taken too. Exits 2 where rows would stop a run.",
        "graftwork.cli.data:DataContext",
        trains=True,
    ),
    Verb(
        "graftwork.cli.sweep:sweep",
        "Train every combination of some fields' values, each in a directory of its own.",
        (
            "nemorun graft sweep --factory smollm2_135m 'sweep.peft[0].dim=[8,16]' 'sweep.optim.lr=[1e-4,1e-3]' "
            "parallel=2 --yes",
        ),
        "What finetune takes is taken too. Runs that are finished are skipped, interrupted ones go on.",
        "graftwork.cli.sweep:SweepContext",
        trains=True,
    ),
    Verb(
        "graftwork.executors.jobs:status",
        "Tell how an experiment is, or the newest ones when none is named.",
        ("nemorun graft status", "nemorun graft status default"),
    ),
    Verb(
        "graftwork.executors.jobs:logs",
        "Print what an experiment has written so far, all ranks and all attempts.",
        ("nemorun graft logs default follow=True",),
    ),
    Verb(
        "graftwork.executors.jobs:attach",
        "Show an experiment as if it had been launched here, to its end.",
        ("nemorun graft attach default",),
    ),
    Verb(
        "graftwork.executors.jobs:cancel",
        "Cancel an experiment; a training saves its state first.",
        ("nemorun graft cancel default",),
    ),
    Verb(
        "graftwork.training.leaderboard:compare",
        "Show finished runs beside each other, best first.",
        ("nemorun graft compare runs/default runs/other output=runs.html",),
    ),
    Verb(
        "graftwork.cli.completion:completion",
        "Print what lets a shell complete verbs, recipes and fields: bash or zsh.",
        ('eval "$(nemorun graft completion bash)"',),
        "The script holds the names of this version and starts no Python: put it into a file that the shell reads.",
    ),
)
"""In the order in which help lists them."""
