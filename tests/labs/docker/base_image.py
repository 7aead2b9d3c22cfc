"""An image to build on where no registry answers, made of this machine: Debian, this Python, its packages."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = Path(sys.prefix) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
# Large, and not imported by a training; pip finds their metadata and asks for nothing.
HEAVY = ("ray", "mypy", "mypyc", "material", "grimp", "torch/include", "torch/test", "pyarrow/include")
ADDED = ("passwd", "libstdc++6")
_MERGED = re.compile(r"^/(bin|sbin|lib|lib64)/")
_TEXTS = re.compile(r"^/usr/share/(doc|man|locale|info|lintian|bug)/")
IMPORT_TIMEOUT = 300
LABEL = "graftwork-lab"


def base_image() -> str:
    """Return the name of the image, importing it unless the daemon has that of just these versions."""
    versions = sorted(f"{one.name}=={one.version}" for one in distributions() if one.name != "graftwork")
    key = sha256("\n".join([Path(__file__).read_text(), sys.version, sys.prefix, *versions]).encode()).hexdigest()
    name = f"graftwork-lab-base:{key[:12]}"
    if subprocess.run(["docker", "image", "inspect", name], capture_output=True, timeout=30).returncode:
        _import(name)
    return name


def _import(name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root, listed = Path(scratch) / "root", Path(scratch) / "files"
        skeleton(root)
        listed.write_text("\n".join(sorted({_MERGED.sub(r"/usr/\1/", path) for path in system_files()})))
        tar = ["tar", "-c", "--numeric-owner", *_leave_out(), "-C", str(root), ".", "-C", "/"]
        tar += ["--no-recursion", "-T", str(listed), "--recursion", sys.base_prefix, sys.prefix]
        path = f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        with subprocess.Popen(tar, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as packing:
            # what is to be built on it finds everything in it, or fails
            made = ["docker", "import", "--change", f"ENV PATH={path} PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1"]
            made += ["--change", f"LABEL {LABEL}=1", "-", name]
            subprocess.run(made, stdin=packing.stdout, check=True, capture_output=True, timeout=IMPORT_TIMEOUT)


def _leave_out() -> list[str]:
    python = f"{sys.base_prefix}/lib/python{sys.version_info.major}.{sys.version_info.minor}"
    paths = [f"{PACKAGES}/{one}" for one in (*HEAVY, "__editable__*", "graftwork*")]
    paths += [f"{python}/site-packages", f"{python}/test", f"{python}/config-*", f"{sys.base_prefix}/include"]
    return [f"--exclude={path}" for path in paths]


def system_files() -> Iterable[str]:
    """Yield the files of Debian's essential packages, of what they need, and the libraries that Python loads."""
    installed = _lines("dpkg-query", "-W", "-f=${Essential} ${Package}\n")
    essential = [line.split()[1] for line in installed if line.startswith("yes ")]
    only = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    needed = _lines("apt-cache", "depends", "--recurse", "--installed", *only, *essential, *ADDED)
    names = sorted({line for line in needed if re.match(r"[a-z0-9]", line)})
    for path in _lines("dpkg-query", "-L", *names):
        if os.path.lexists(path) and not os.path.isdir(path) and not _TEXTS.match(path):
            yield path
    yield from python_libraries()


def python_libraries() -> Iterable[str]:
    """Yield the shared libraries that this Python and the modules of its standard library load."""
    modules = Path(sys.base_prefix).glob("lib/python3*/lib-dynload/*.so")
    found = "\n".join(_lines("ldd", os.path.realpath(sys.executable), *map(str, modules)))
    for path in set(re.findall(r"=> (/\S+)", found)):
        if not path.startswith(sys.base_prefix + "/"):  # named twice, tar would make it a link to itself
            yield path
            yield os.path.realpath(path)


def _lines(*command: str) -> list[str]:
    """Return what a query prints; these end with 1 when one of many names is not known, as virtual packages are not."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()


def skeleton(root: Path) -> None:
    """Make what a root file system holds beside the files of its packages."""
    for name in ("usr", "etc", "proc", "sys", "dev", "run", "root", "home", "var", "tmp", "var/tmp"):
        (root / name).mkdir(parents=True)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        if Path("/", name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/ld.so.cache").write_bytes(Path("/etc/ld.so.cache").read_bytes())
