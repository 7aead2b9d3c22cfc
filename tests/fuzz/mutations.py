"""A small seeded mutation engine: JSON documents, bytes, safetensors files, whole directories.

A ``Mutation`` is a name and a seed; the same two make the same damage to the same files, so a finding is one line in a
corpus: ``json.wrong type#17``. ``draw(count)`` gives every kind its turn; ``damage(directory, mutation)`` applies one
to the files of a directory. What the damaged thing must do then (refuse in one sentence, or behave as before) is the
business of whoever asks.
"""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rng = random.Random
Where = tuple[Any, Any]
"""A container of a JSON document and the key or index of one value in it."""

_HOLE = "\x01hole\x01"
_LONG = 1 << 20
_WRONG = [None, True, False, 0, -1, 7, 1.5, "", "x", [], {}, [[]], [1, "a"], {"a": 1}, "1e3", "null"]
_HUGE = ["1e308", "-1e308", "1e999", "100000000", "-9223372036854775809", "18446744073709551616", "9" * 5000, "1e-320"]
_TEXT = [
    "\x00",
    "a\x00b",
    "../" * 30 + "etc/passwd",
    "/etc/passwd",
    "x" * 300,
    "é\u202e\U0001f600",
    "\ud800",
    "a\nb\rc",
]


@dataclass(frozen=True)
class Mutation:
    """One reproducible damage: the name of its kind, ``family.what``, and a seed."""

    kind: str
    seed: int

    @classmethod
    def parse(cls, text: str) -> "Mutation":
        """Return the mutation that ``str`` wrote as ``kind#seed``."""
        kind, _, seed = text.rpartition("#")
        return cls(kind, int(seed))

    @property
    def family(self) -> str:
        """``json``, ``bytes``, ``safetensors`` or ``directory``."""
        return self.kind.partition(".")[0]

    @property
    def rng(self) -> Rng:
        """A fresh generator that depends on name and seed only."""
        return random.Random(f"{self.kind}#{self.seed}")

    def __str__(self) -> str:
        return f"{self.kind}#{self.seed}"


def draw(count: int, families: Sequence[str] = ("json", "bytes", "safetensors", "directory")) -> list[Mutation]:
    """Return ``count`` mutations of the families, every kind in turn, each turn with a new seed."""
    kinds = [kind for family in families for kind in KINDS[family]]
    return [Mutation(kinds[i % len(kinds)], i // len(kinds)) for i in range(count)]


def damage(directory: Path, mutation: Mutation) -> Path | None:
    """Damage a file of ``directory`` (or the directory); return which, None where there is nothing of that kind."""
    if mutation.family == "directory":
        DIRECTORY[mutation.kind](directory, mutation.rng)
        return directory
    suffix = {"json": ".json", "safetensors": ".safetensors", "bytes": ""}[mutation.family]
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name.endswith(suffix))
    if not files:
        return None
    file = mutation.rng.choice(files)
    if mutation.family == "json":
        file.write_bytes(mutate_json(file.read_text(), mutation))
    else:
        file.write_bytes(mutate(file.read_bytes(), mutation))
    return file


def mutate(data: bytes, mutation: Mutation) -> bytes:
    """Return damaged bytes (family ``bytes``) or the damaged bytes of a safetensors file (``safetensors``)."""
    return (BYTES if mutation.family == "bytes" else SAFETENSORS)[mutation.kind](data, mutation.rng)


def mutate_json(text: str, mutation: Mutation) -> bytes:
    """Return a damaged JSON document; that of a few kinds is no valid JSON or no valid UTF-8."""
    return JSON[mutation.kind](json.loads(text), mutation.rng)


def walk(document: Any) -> Iterator[Where]:
    """Yield every place of a JSON document: container and key or index."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        yield document, key
        if isinstance(value, dict | list):
            yield from walk(value)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _dump(document: Any, hole: str = "") -> bytes:
    """Write a document; the value ``_HOLE`` in it becomes the raw text ``hole``."""
    text = json.dumps(document, indent=1)
    return text.replace(json.dumps(_HOLE), hole).encode("utf-8", "surrogatepass")


def _somewhere(document: Any, rng: Rng) -> Where:
    return rng.choice(list(walk(document)) or [([document], 0)])


def _replaced(choose: Callable[[Rng], Any]) -> Callable[[Any, Rng], bytes]:
    def change(document: Any, rng: Rng) -> bytes:
        container, key = _somewhere(document, rng)
        container[key] = choose(rng)
        return _dump(document)

    return change


def _raw(choose: Callable[[Rng], str]) -> Callable[[Any, Rng], bytes]:
    def change(document: Any, rng: Rng) -> bytes:
        container, key = _somewhere(document, rng)
        container[key] = _HOLE
        return _dump(document, choose(rng))

    return change


def _missing(document: Any, rng: Rng) -> bytes:
    container, key = _somewhere(document, rng)
    del container[key]
    return _dump(document)


def _a_dict(document: Any, rng: Rng) -> dict[str, Any]:
    return rng.choice([document] + [c[k] for c, k in walk(document) if isinstance(c[k], dict)])


def _extra(document: Any, rng: Rng) -> bytes:
    _a_dict(document, rng)[rng.choice(["extra", "", "é", "__class__", "name", "x" * 1000, "\x00"])] = rng.choice(_WRONG)
    return _dump(document)


def _renamed(document: Any, rng: Rng) -> bytes:
    chosen = _a_dict(document, rng)
    if chosen:
        key = rng.choice(list(chosen))
        chosen[rng.choice([key.upper(), key + "s", key[:-1], "self", f"{key}\u200b"])] = chosen.pop(key)
    return _dump(document)


def _swapped(document: Any, rng: Rng) -> bytes:
    (first, i), (second, j) = _somewhere(document, rng), _somewhere(document, rng)
    if not any(isinstance(c[k], dict | list) for c, k in ((first, i), (second, j))):
        first[i], second[j] = second[j], first[i]
    return _dump(document)


def _reordered(document: Any, rng: Rng) -> bytes:
    lists = [c[k] for c, k in walk(document) if isinstance(c[k], list) and len(c[k]) > 1]
    if lists:
        rng.shuffle(rng.choice(lists))
    return _dump(document)


def _doubled_item(document: Any, rng: Rng) -> bytes:
    lists = [c[k] for c, k in walk(document) if isinstance(c[k], list) and c[k]]
    if lists:
        chosen = rng.choice(lists)
        chosen.append(json.loads(json.dumps(rng.choice(chosen))))
    return _dump(document)


def _doubled_key(document: Any, rng: Rng) -> bytes:
    chosen = _a_dict(document, rng)
    if chosen:
        key = rng.choice(list(chosen))
        chosen[_HOLE] = 0
        doubled = f"{json.dumps(key)}: {json.dumps(rng.choice(_WRONG))}"
        return json.dumps(document, indent=1).replace(f"{json.dumps(_HOLE)}: 0", doubled).encode()
    return _dump(document)


def _whole(document: Any, rng: Rng) -> bytes:
    return json.dumps(rng.choice([*_WRONG, [document], {"a": document}])).encode()


def _not_json(document: Any, rng: Rng) -> bytes:
    data = _dump(document)
    return rng.choice([b"", b"{", data + b"}", data[:-2], b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, data + b"\x00"])


def _deep(rng: Rng) -> str:
    depth = rng.choice([60, 500, 990, 5_000, 200_000])
    return rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth])


def _long(rng: Rng) -> str:
    return rng.choice(
        [json.dumps("x" * _LONG), "[" + "0," * 100_000 + "0]", json.dumps({str(i): i for i in range(9999)})]
    )


JSON: dict[str, Callable[[Any, Rng], bytes]] = {
    "json.wrong type": _replaced(lambda rng: rng.choice(_WRONG)),
    "json.text": _replaced(lambda rng: rng.choice(_TEXT)),
    "json.missing key": _missing,
    "json.extra key": _extra,
    "json.renamed key": _renamed,
    "json.doubled key": _doubled_key,
    "json.doubled item": _doubled_item,
    "json.swapped values": _swapped,
    "json.reordered list": _reordered,
    "json.deep": _raw(_deep),
    "json.long": _raw(_long),
    "json.huge number": _raw(lambda rng: rng.choice(_HUGE)),
    "json.no number": _raw(lambda rng: rng.choice(["NaN", "Infinity", "-Infinity"])),
    "json.other document": _whole,
    "json.no document": _not_json,
}

# ---- bytes -----------------------------------------------------------------------------------------------------------


def _flip(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _swap_blocks(data: bytes, rng: Rng) -> bytes:
    size = max(1, len(data) // 8)
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    rng.shuffle(blocks)
    return b"".join(blocks)


def _zero_block(data: bytes, rng: Rng) -> bytes:
    start, size = rng.randrange(len(data) + 1), max(1, len(data) // rng.choice([4, 64]))
    return data[:start] + bytes(len(data[start : start + size])) + data[start + size :]


BYTES: dict[str, Callable[[bytes, Rng], bytes]] = {
    "bytes.flip": _flip,
    "bytes.cut": lambda data, rng: data[: rng.choice([0, 1, 7, 8, len(data) // 2, max(0, len(data) - 1)])],
    "bytes.head lost": lambda data, rng: data[rng.choice([1, 8, len(data) // 2]) :],
    "bytes.append": lambda data, rng: data + rng.choice([b"\0", b"\n", b" " * 64, rng.randbytes(1000), data]),
    "bytes.swap blocks": _swap_blocks,
    "bytes.zero block": _zero_block,
    "bytes.noise": lambda data, rng: rng.randbytes(rng.choice([1, 100, 10_000])),
}

# ---- safetensors -----------------------------------------------------------------------------------------------------


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header: Any, data: bytes) -> bytes:
    """Return a safetensors file with this header, valid or not."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _in_header(change: Callable[[dict[str, Any], str, Rng], Any]) -> Callable[[bytes, Rng], bytes]:
    def apply(data: bytes, rng: Rng) -> bytes:
        header, rest = split_safetensors(data)
        change(header, rng.choice(sorted(header.keys() - {"__metadata__"}) or ["x"]), rng)
        return join_safetensors(header, rest)

    return apply


def _dtype(header: dict[str, Any], key: str, rng: Rng) -> None:
    header[key]["dtype"] = rng.choice(
        ["F8_E4M3", "F8_E5M2", "F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F31", 3]
    )


def _shape(header: dict[str, Any], key: str, rng: Rng) -> None:
    shape = header[key]["shape"]
    header[key]["shape"] = rng.choice(
        [shape[::-1], [*shape, 1], shape[1:], [], [0], [-1, *shape], [2**62, 4], [100_000_000, 100_000_000], "x", [1.5]]
    )


def _offsets(header: dict[str, Any], key: str, rng: Rng) -> None:
    start, end = header[key]["data_offsets"]
    header[key]["data_offsets"] = rng.choice(
        [
            [end, start],
            [0, end - start],
            [start, end + 4],
            [start + 4, end],
            [-4, end],
            [2**63, 2**64],
            [start],
            "x",
            [],
        ]
    )


def _name(header: dict[str, Any], key: str, rng: Rng) -> None:
    new = rng.choice(
        [key + "x", key.upper(), f"other.{key}", "", "\0", "x" * 100_000, "../" + key, f"base_model.{key}"]
    )
    header[new] = header.pop(key)


def _exchange_names(header: dict[str, Any], key: str, rng: Rng) -> None:
    other = rng.choice(sorted(header.keys() - {"__metadata__"}))
    header[key], header[other] = header[other], header[key]


def _metadata(header: dict[str, Any], key: str, rng: Rng) -> None:
    header["__metadata__"] = rng.choice(
        [{"format": "pt"}, {"format": "np"}, {}, [], {"a": 1}, None, {"x": "y" * _LONG}]
    )


def _extra_tensor(header: dict[str, Any], key: str, rng: Rng) -> None:
    header[rng.choice(["x", f"{key}.x", key.partition(".")[0] + ".x"])] = {
        "dtype": "F32",
        "shape": [0],
        "data_offsets": [0, 0],
    }


def _header_size(data: bytes, rng: Rng) -> bytes:
    size = rng.choice([0, 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
    return struct.pack("<Q", size) + data[8:]


def _values(data: bytes, rng: Rng) -> bytes:
    header, rest = split_safetensors(data)
    value = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 0.0, 1e-42]))
    place = rng.randrange(max(1, len(rest) // 4)) * 4
    return join_safetensors(header, rest[:place] + value + rest[place + 4 :])


SAFETENSORS: dict[str, Callable[[bytes, Rng], bytes]] = {
    "safetensors.dtype": _in_header(_dtype),
    "safetensors.shape": _in_header(_shape),
    "safetensors.offsets": _in_header(_offsets),
    "safetensors.name": _in_header(_name),
    "safetensors.names exchanged": _in_header(_exchange_names),
    "safetensors.lost tensor": _in_header(lambda header, key, rng: header.pop(key)),
    "safetensors.extra tensor": _in_header(_extra_tensor),
    "safetensors.metadata": _in_header(_metadata),
    "safetensors.header size": _header_size,
    "safetensors.values": _values,
    "safetensors.data cut": lambda data, rng: data[: -rng.choice([1, 4, 100])],
    "safetensors.data appended": lambda data, rng: data + bytes(rng.choice([1, 4, 100])),
}

# ---- directories -----------------------------------------------------------------------------------------------------


def _a_file(directory: Path, rng: Rng) -> Path:
    return rng.choice(sorted(p for p in directory.rglob("*") if p.is_file()))


def _as_directory(directory: Path, rng: Rng) -> None:
    file = _a_file(directory, rng)
    file.unlink()
    file.mkdir()


def _linked_outside(directory: Path, rng: Rng) -> None:
    """Move a file out of the directory, or name a foreign one, and leave a symbolic link in its place."""
    file = _a_file(directory, rng)
    outside = directory.parent / f"outside-{directory.name}-{file.name}"
    file.rename(outside)
    file.symlink_to(
        rng.choice([str(outside), os.path.relpath(outside, file.parent), "/etc/passwd", "/dev/zero", "/nowhere"])
    )


def _as_pipe(directory: Path, rng: Rng) -> None:
    file = _a_file(directory, rng)
    file.unlink()
    os.mkfifo(file)


def _extra_file(directory: Path, rng: Rng) -> None:
    name = rng.choice(["notes.txt", ".hidden", "x" * 200, "é", "adapter_model.bin", "model.safetensors"])
    (directory / name).write_bytes(rng.randbytes(10))


def _renamed_file(directory: Path, rng: Rng) -> None:
    file = _a_file(directory, rng)
    file.rename(file.with_name(file.name + ".bak"))


def _exchanged_files(directory: Path, rng: Rng) -> None:
    first, second = _a_file(directory, rng), _a_file(directory, rng)
    held = first.read_bytes(), second.read_bytes()
    second.write_bytes(held[0])
    first.write_bytes(held[1])


DIRECTORY: dict[str, Callable[[Path, Rng], None]] = {
    "directory.missing file": lambda directory, rng: _a_file(directory, rng).unlink(),
    "directory.extra file": _extra_file,
    "directory.empty file": lambda directory, rng: _a_file(directory, rng).write_bytes(b"") and None,
    "directory.renamed file": _renamed_file,
    "directory.exchanged files": _exchanged_files,
    "directory.file is a directory": _as_directory,
    "directory.file is a link outside": _linked_outside,
    "directory.file is a pipe": _as_pipe,
}

KINDS: dict[str, list[str]] = {
    "json": list(JSON),
    "bytes": list(BYTES),
    "safetensors": list(SAFETENSORS),
    "directory": list(DIRECTORY),
}
