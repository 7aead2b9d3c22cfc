"""The Dockerfile keeps hadolint's rules, as far as its text shows; what hadolint itself would say is not asked."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "Dockerfile").read_text()
IGNORED = re.compile(r"#\s*hadolint ignore=")


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in found]


def findings(text: str) -> list[str]:
    """The hadolint rules that a Dockerfile breaks, each named once for every place."""
    found, arguments, shell, user, stages = [], {}, "", "", []
    for word, rest in instructions(text):
        if word == "ARG":
            name, _, default = rest.partition("=")
            arguments[name] = default
        elif word == "FROM":
            image, _, name = re.sub(r"\$\{(\w+)\}", lambda m: arguments.get(m[1], m[0]), rest).partition(" AS ")
            found += ["DL3006"] * (image not in stages and ":" not in image) + ["DL3007"] * image.endswith(":latest")
            stages.append(name)
            shell, user = "", "root"
        elif word == "SHELL":
            shell = rest
        elif word == "USER":
            user = rest
        elif word == "RUN":
            found += run_findings(rest, shell)
        elif word == "ADD":
            found.append("DL3020")
        elif word in ("CMD", "ENTRYPOINT") and not rest.startswith("["):
            found.append("DL3025")
        if word in ("CMD", "ENTRYPOINT") and user in ("root", "0"):
            found.append("DL3002")
        if word == "WORKDIR" and not rest.startswith("/"):
            found.append("DL3000")
    return found


def run_findings(command: str, shell: str) -> list[str]:
    """The rules that one RUN breaks."""
    found = []
    outside_quotes = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
    if re.search(r"(?<!\|)\|(?!\|)", outside_quotes) and "pipefail" not in shell:
        found.append("DL4006")
    for pip in re.findall(r"pip (?:install|wheel)[^&;|]*", command):
        found += ["DL3042"] * ("--no-cache-dir" not in pip)
        if pip.startswith("pip install") and not re.search(r"--constraint|--requirement|/\*\.whl|[=<>~]=?\d", pip):
            found.append("DL3013")
    for apt in re.findall(r"apt-get install[^&;|]*", command):
        found += ["DL3015"] * ("--no-install-recommends" not in apt) + ["DL3014"] * (" -y" not in apt)
        found += ["DL3008"] * any("=" not in one for one in apt.split()[2:] if not one.startswith("-"))
        found += ["DL3009"] * ("rm -rf /var/lib/apt/lists" not in command)
    found += ["DL3004"] * bool(re.search(r"\bsudo\b", command)) + ["DL3003"] * command.startswith("cd ")
    found += ["DL3046"] * ("useradd" in command and "--no-log-init" not in command and " -l" not in command)
    return found


def test_no_rule_is_broken_or_ignored() -> None:
    assert findings(TEXT) == [] and not IGNORED.search(TEXT)


BROKEN = {
    "DL3000": ("WORKDIR /src", "WORKDIR src"),
    "DL3002": ("USER graftwork", "USER root"),
    "DL3006": ("python:3.11.14-slim-bookworm", "python"),
    "DL3007": ("pytorch:25.09-py3", "pytorch:latest"),
    "DL3008": ("RUN useradd", "RUN apt-get install -y --no-install-recommends git && useradd"),
    "DL3013": ("'setuptools>=77'", "setuptools"),
    "DL3015": ("RUN useradd", "RUN apt-get install -y git=1 && useradd"),
    "DL3020": ("COPY graftwork", "ADD graftwork"),
    "DL3025": ('["nemorun", "graft", "--help"]', "nemorun graft"),
    "DL3042": (" --no-cache-dir", ""),
    "DL3046": (" --no-log-init", ""),
    "DL4006": ('SHELL ["/bin/bash", "-o", "pipefail", "-c"]', ""),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_noticed(rule: str) -> None:
    was, broken = BROKEN[rule]
    assert was in TEXT
    assert rule in findings(TEXT.replace(was, broken))


def test_every_variant_ends_as_somebody_who_is_not_root() -> None:
    stages = re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]
    images = [stage for stage in stages if "\nCMD " in stage]
    assert [stage.split()[2] for stage in images] == ["cpu", "gpu"]
    assert all(stage.rindex("\nUSER graftwork") > stage.rindex("\nRUN ") for stage in images)


def test_only_what_a_wheel_needs_is_sent_to_the_daemon() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {name for word, rest in instructions(TEXT) if word == "COPY" for name in rest.split()[:-1]}
    assert lines[0] == "*" and sent == copied
