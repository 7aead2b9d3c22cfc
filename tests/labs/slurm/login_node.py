"""A login node: an sshd on this machine that lets one key in, and the files of a user who knows it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path

from tests.labs.slurm.lab import SlurmLab, free_ports, wait_until

SSHD = "/usr/sbin/sshd"


def install() -> None:
    """Install Debian's openssh-server and rsync where they are not here."""
    missing = [name for name, tool in {"openssh-server": SSHD, "rsync": "rsync"}.items() if not shutil.which(tool)]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr


@contextmanager
def login_node(directory: Path, lab: SlurmLab) -> Iterator[dict[str, object]]:
    """Yield the ``host``, ``user``, ``port`` and ``identity`` of a node from which ``lab`` takes jobs."""
    install()
    port = free_ports(1)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": directory / "host",
        "AuthorizedKeysFile": directory / "user.pub", "StrictModes": "no", "PidFile": directory / "pid",
        "SetEnv": f"SLURM_CONF={lab.config}", "Subsystem": "sftp internal-sftp",
    }  # fmt: skip
    (directory / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    known = directory / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {(directory / 'host.pub').read_text()}")
    _know(directory / "bin", known)
    with subprocess.Popen([SSHD, "-D", "-e", "-f", directory / "config"], stderr=subprocess.DEVNULL) as daemon:
        try:
            wait_until((directory / "pid").exists, "sshd", 30)
            yield {"host": "127.0.0.1", "user": getuser(), "port": port, "identity": str(directory / "user")}
        finally:
            daemon.terminate()


def _know(folder: Path, known: Path) -> None:
    """Put an ``ssh`` into ``folder`` that knows the hosts of a file, as if the user had connected once."""
    folder.mkdir()
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -o UserKnownHostsFile={known} "$@"\n')
    (folder / "ssh").chmod(0o755)


PYTHON = str(Path(sys.executable).parent)
"""Where the job's Python is: a node that is reached over ssh has not the environment that submits."""
