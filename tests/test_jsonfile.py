"""JSON of others: read within limits, refused in one short sentence."""

import json
import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from graftwork.errors import ArtifactError, CheckpointError, quoted
from graftwork.jsonfile import named_inside, read_json, read_object, read_schema


class Pair(BaseModel, extra="forbid"):
    """Two numbers."""

    left: int
    right: list[int]


def test_good_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"left": 1, "right": [2, 3]}')
    assert read_json(path, CheckpointError) == read_object(path, CheckpointError) == {"left": 1, "right": [2, 3]}
    assert read_schema(path, Pair, CheckpointError) == Pair(left=1, right=[2, 3])
    path.write_text('{"small": 1e-320, "deep": ' + "[" * 60 + "]" * 60 + "}")
    read_json(path, CheckpointError)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 64"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested deeper than 64"),
        (b'{"a": 1, "a": 2}', "the key 'a' is given twice"),
        (b'{"%s": 1, "%s": 2}' % (b"k" * 10**5, b"k" * 10**5), "is given twice"),
        (b"[NaN]", "'NaN' is no finite number"),
        (b"[-Infinity]", "'-Infinity' is no finite number"),
        (b"[1e999]", "'1e999' is no finite number"),
        (b"9" * 5000, "is not valid JSON"),
        (b" " * 2_000_001, "is larger than 2,000,000 bytes"),
    ],
)
def test_bad_files(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_json(path, ArtifactError, limit=2_000_000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200 + len(str(path))


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "is not a JSON object|does not fit: "),
        ({"left": "x" * 10**6, "right": []}, "does not fit: 'left'"),
        ({"left": 1, "right": [], "\n" * 10**6: 1}, "does not fit: "),
        ({"left": 1, "right": {}, "z": 1}, r"does not fit: 'right': .*\(and 1 more\)"),
    ],
)
def test_schema(value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=message) as caught:
        read_schema(path, Pair, ArtifactError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("nowhere", "pipe", "", "n" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match="cannot be read|is not a regular file") as caught:
            read_json(tmp_path / name, CheckpointError)
        assert len(str(caught.value)) < 300


def test_names_stay_in_their_directory(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "other").write_text("")
    (home / "own").write_text("")
    (home / "link").symlink_to("own")
    (home / "out").symlink_to("../other")
    (home / "loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to("home")
    for directory in (home, tmp_path / "alias"):
        assert named_inside(directory, "own", "it", CheckpointError).read_text() == ""
        assert named_inside(directory, "link", "it", CheckpointError).read_text() == ""
    for name in ("../other", "/etc/passwd", "a/b", "", "..", "a\0b", "n" * 300, "\ud800", 3, None, ["own"]):
        with pytest.raises(CheckpointError, match="it names the file .* a plain name"):
            named_inside(home, name, "it", CheckpointError)
    for name in ("out", "loop"):
        with pytest.raises(CheckpointError, match="leads out of its directory|cannot be read"):
            named_inside(home, name, "it", CheckpointError)


def test_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("x")
    (snapshot / "model").symlink_to("../../blobs/1")
    assert named_inside(snapshot, "model", "it", CheckpointError).read_text() == "x"


def test_quoted_is_one_short_line() -> None:
    assert quoted("a\nb") == r"'a\nb'" and quoted("it's", bare=True) == "it's" and quoted(Path("a")) == "'a'"
    assert len(quoted("x" * 10**7)) < 130 and len(quoted([["x" * 10**6] * 10**6] * 3)) < 130
    assert quoted({"a": 1}) == "{'a': 1}"
