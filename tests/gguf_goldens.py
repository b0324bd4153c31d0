"""What a GGUF holds, in short: metadata by key, and each tensor's type, shape and hash. Read by neither gguf-py nor us.

The layout of the file is that of llama.cpp's docs (gguf.md, version 3).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

GOLDENS = Path(__file__).resolve().parent / "goldens" / "gguf"
KINDS = ("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY", "UINT64", "INT64",
         "FLOAT64")  # fmt: skip
FORMATS = {"UINT8": "B", "INT8": "b", "UINT16": "H", "INT16": "h", "UINT32": "I", "INT32": "i", "FLOAT32": "f",
           "BOOL": "?", "UINT64": "Q", "INT64": "q", "FLOAT64": "d"}  # fmt: skip
# Number of a tensor's type -> its name, weights a block, bytes a block; those that a converter writes
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", 32, 34), 24: ("I8", 1, 1), 26: ("I32", 1, 4),
         27: ("I64", 1, 8), 30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17)}  # fmt: skip
LONG = 24  # arrays beyond this are told by count and hash


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        form = "<" + FORMATS[kind]
        [found] = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        length = self.number("UINT64")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def entry(self) -> list[Any]:
        """Return a value with its type: [type, value], or ["ARRAY", type of elements, values or what tells them]."""
        kind = KINDS[self.number("UINT32")]
        if kind != "ARRAY":
            return [kind, self.text() if kind == "STRING" else self.number(kind)]
        inner, count, start = KINDS[self.number("UINT32")], self.number("UINT64"), self.at
        values = [self.text() if inner == "STRING" else self.number(inner) for _ in range(count)]
        if count <= LONG:
            return [kind, inner, values]
        return [kind, inner, {"count": count, "xxh3": xxhash.xxh3_64_hexdigest(self.data[start : self.at])}]


def summary(path: Path) -> dict[str, Any]:
    """Return {"metadata": {key: entry}, "tensors": {name: [type, shape, hash]}}; shapes have columns last."""
    reader = _Reader(path.read_bytes())
    assert reader.data[:8] == b"GGUF\x03\0\0\0"
    reader.at = 8
    tensors, keys = reader.number("UINT64"), reader.number("UINT64")
    metadata = {reader.text(): reader.entry() for _ in range(keys)}
    found = []
    for _ in range(tensors):
        name, dimensions = reader.text(), reader.number("UINT32")
        shape = [reader.number("UINT64") for _ in range(dimensions)][::-1]
        found.append((name, shape, TYPES[reader.number("UINT32")], reader.number("UINT64")))
    alignment = metadata.get("general.alignment", ["UINT32", 32])[1]
    start = -(-reader.at // alignment) * alignment
    made = {}
    for name, shape, (kind, weights, size), offset in found:
        count = math.prod(shape) // weights * size
        data = reader.data[start + offset : start + offset + count]
        assert len(data) == count, name
        made[name] = [kind, shape, xxhash.xxh3_64_hexdigest(data)]
    return {"metadata": dict(sorted(metadata.items())), "tensors": dict(sorted(made.items()))}


def golden_path(kind: str) -> Path:
    return GOLDENS / f"{kind}.json"


def dump(document: Mapping[str, Any]) -> str:
    """Return a golden as text, a line for each key and each tensor."""
    parts = []
    for name, part in document.items():
        rows = ",\n".join(
            f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in part.items()
        )
        parts.append(f'"{name}": {{\n{rows}\n}}')
    return "{" + ",\n".join(parts) + "}\n"


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return what differs in two summaries, a line for each key or tensor."""
    lines = []
    for part in ("metadata", "tensors"):
        for key in sorted({*wanted[part], *found[part]}):
            one, other = (each[part].get(key, "absent") for each in (wanted, found))
            if json.dumps(one) != json.dumps(other):
                lines.append(f"{part} {key}: expected {_short(one)}, found {_short(other)}")
    return lines


def _short(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:160]
