"""``nemorun graft VERB``: importing this module (NeMo Run's entry point does) registers verbs and factories."""

import nemo_run as run

from graftwork.cli.context import GraftContext
from graftwork.cli.factories import register
from graftwork.training import finetune

NAMESPACE = "graft"

register()
for _verb in (finetune,):
    run.cli.entrypoint(_verb, namespace=NAMESPACE, run_ctx_cls=GraftContext)
