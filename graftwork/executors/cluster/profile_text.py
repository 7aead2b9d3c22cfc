"""The text of a new ``cluster.yaml``: every field of a profile, with a word on each."""

from pathlib import Path

from graftwork.errors import ConfigError, quoted

TEXT = """\
# Clusters that graftwork submits to. Each name below is a profile; the first is taken when none is named:
#   nemorun graft finetune ... run.executor=slurm                                 the first one for Slurm
#   nemorun graft finetune ... run.executor=slurm run.executor.profile=laptop     another one
# A field on the command line (run.executor.time=02:00:00) wins over the profile's.
# 'nemorun graft profile check NAME' tests a profile from here.

cluster:                        # on the login node of a Slurm cluster
  executor: slurm
  # account: my_account         # whom the time is charged to, where the cluster asks for it
  # partition: gpu              # 'sinfo -s' lists them; without one, Slurm's default
  # qos: normal
  # nodes: 2                    # unset: as many as the recipe has (num_nodes)
  # gpus_per_node: 8            # what a node has; a job takes as many as the recipe asks for. Unset: none are asked for
  # cpus_per_task: 8            # of a rank
  # memory: 64G                 # of a node
  time: "01:00:00"              # '30' is minutes, '2-12' days and hours
  warning: 120                  # seconds before the end at which the run saves its state and stops; 0: never
  # requeues: 3                 # how often such a run goes back into the queue by itself; it goes on where it stopped
  # launcher: srun              # srun starts every rank; torchrun: one task a node starts its ranks

  # Where the job's Python comes from. Without a container: this environment, or what these lines set up.
  # setup:
  #   - module load cuda
  #   - source /shared/venv/bin/activate
  # With one (needs pyxis on the cluster):
  # container_image: /shared/images/graftwork.sqsh
  # container_mounts:
  #   - /shared/models:/shared/models:ro

  # env:
  #   HF_HOME: /shared/huggingface
  # job_dir: /shared/me/jobs    # code and logs of jobs; all nodes must see it. Unset: $NEMORUN_HOME
  # sbatch: [--exclusive]       # more flags of sbatch
  # srun: []                    # more flags of srun

  # How code reaches the job. 'installed' ships nothing: the job runs the graftwork of its environment.
  # 'git' ships the commit of the repository that you submit from; refused while files differ, unless allow_dirty.
  code: installed
  # allow_dirty: false

# remote:                       # the same cluster from a laptop
#   executor: slurm
#   ssh:
#     host: login.example.org
#     user: me
#     port: 22
#     identity: ~/.ssh/id_ed25519
#   job_dir: /shared/me/jobs
#   setup:
#     - source /shared/venv/bin/activate

# laptop:                       # a container on this machine
#   executor: docker
#   container_image: graftwork:latest
#   network: host
#   shared_memory: 8G
"""


def write_profile(path: Path) -> None:
    """Write a commented file of profiles; raises ConfigError where there is a file already, or none can be made."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEXT)
    except FileExistsError as error:
        raise ConfigError(f"{quoted(path)} is there already and stays as it is; edit it, or move it away.") from error
    except OSError as error:
        raise ConfigError(f"{quoted(path)} cannot be written: {error.strerror}.") from error
