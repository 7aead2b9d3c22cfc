"""Launch a recipe and check how it ended: NeMo Run itself reports success whatever the task did."""

from concurrent.futures import ThreadPoolExecutor

import nemo_run as run

from graftwork.endings import Interrupted
from graftwork.executors.following.live import live_log
from graftwork.executors.following.relay import Relay, relayed
from graftwork.executors.local import built
from graftwork.executors.placing.placement import placed
from graftwork.executors.placing.refusals import make_folders, refuse_unready
from graftwork.executors.submission.containers import find_image
from graftwork.executors.submission.job import Job, task_name


def launch(
    recipe: run.Partial,
    executor: run.Executor | run.Config | None = None,
    name: str = "graftwork",
    wait: bool = True,
    tail: bool = True,
    plugins: list[run.Plugin] | None = None,
) -> str:
    """Run ``recipe`` on ``executor`` (default: this machine) as one fresh experiment and return the experiment's id.

    ``wait=False`` detaches where the executor can (this machine cannot); ``tail`` shows what rank 0 prints. A task that
    fails raises the GraftworkError it ended with, or LaunchError with the end of its log. SIGTERM, SIGUSR1 and Ctrl-C
    reach every rank; the state is saved and Interrupted is raised. A second Ctrl-C kills the task.
    """
    recipe, placed_on = placed(recipe, built(executor))
    refuse_unready(placed_on)
    find_image(placed_on)
    make_folders(placed_on)
    job = Job(recipe, placed_on, task_name(name), wait=wait, tail=tail, plugins=plugins or ())
    with live_log(job.name, job.has_ranks) as log, ThreadPoolExecutor(1) as thread:
        relay = Relay(log)
        with relayed(relay):
            # NeMo Run's local scheduler takes SIGTERM and Ctrl-C for itself when it is made in the main thread.
            ended = thread.submit(job.go_through, relay).exception()
    if ended := relay.ending(ended):
        if isinstance(ended, Interrupted):
            ended.tell()
        raise ended
    return job.identity
