"""``nemorun graft VERB``: importing this module (NeMo Run's entry point does) registers verbs and factories.

Here belongs what is typed and printed. What a verb does stands in ``training`` and ``inference``.
"""

import nemo_run as run

from graftwork.cli.context import GraftContext
from graftwork.cli.factories import register
from graftwork.inference import evaluate, generate
from graftwork.training import finetune

NAMESPACE = "graft"

HELP = {
    finetune: """Train a base model, or a stack of adapters on it.

    nemorun graft finetune --factory smollm2_135m 'peft=[lora(dim=16),ptuning]' data.train=train.jsonl --yes

    Any field of the recipe is an override: trainer.max_steps=60, optim.lr=1e-3, 'peft[0].layers=[0,1]', peft=None for
    full fine-tuning. --dryrun prints every field.""",
    generate: """Answer prompts with a base model and maybe an adapter.

    nemorun graft generate base=smollm2_135m adapter=runs/default/adapter 'prompts=["Hello"]'""",
    evaluate: """Loss, exact match and closed-set accuracy on rows with known answers.

    nemorun graft evaluate base=smollm2_135m adapter=runs/default/adapter data=test.jsonl baseline=True""",
}

register()
for _verb, _help in HELP.items():
    run.cli.entrypoint(_verb, namespace=NAMESPACE, help=_help, run_ctx_cls=GraftContext)
