"""Strategies that damage valid input: JSON documents by structure, files by bytes, pickles by opcodes."""

from __future__ import annotations

import copy
import json
import pickletools
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = st.DrawFn

SIZES = (
    0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53,
    2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
WORDS: tuple[Any, ...] = (
    None, True, False, -1, *SIZES, 10**30, -(2**63), 0.0, -0.0, 0.5, -1.5, 1e308, 1e-320, float("nan"), float("inf"),
    float("-inf"), "", "0", "32", "-1", "1e9", "true", "null", "x", "x" * 300, "\x00", "a\x00b", "\ud800", "\udcff",
    "é", "😀", "\x1b[31m", "[/b]", "../x", "/etc/passwd", ".", "..", "a/b", "F32", "BF16", "bfloat16", "torch.float32",
    "none", "default", "weight", "model", "nf4", "fp8", "re:(.+)+!$", "re:(?=x)", "re:[", "{x}", "{expert:>999}", [],
    {}, [None], [[]], [{}], [1], [1, 2], [-1], ["a"], [1.5], {"a": 1}, {"": ""}, {"weight": {}}, {"bits": 4},
    {"type": 1},
)  # fmt: skip
DEEPEST = 10  # levels of a document at which something changes
KEYS = ("", "x", "weight", "\ud800", "a.b", "__metadata__", "type")


def chance(draw: Draw, one_in: int) -> bool:
    """Whether a rare thing happens; shrinks to no."""
    return draw(st.integers(0, one_in - 1)) == one_in - 1


@st.composite
def values(draw: Draw) -> Any:
    """Values of every type of JSON, odd ones among them, and now and then deep ones."""
    found = copy.deepcopy(draw(st.sampled_from(WORDS)))  # what it is put into may change it
    if chance(draw, 40):
        for _ in range(draw(st.sampled_from((3, 40, 150)))):
            found = [found]
    return found


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a document, down to DEEPEST; of long lists, those of the first items."""
    if path:
        yield path
    if len(path) == DEEPEST:
        return
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:30]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def value_at(tree: Any, path: Sequence[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def documents(draw: Draw, document: Any, keys: Sequence[str] = ()) -> Any:
    """Documents that differ from a valid one in a few places: other types, missing, moved, renamed, nested, added."""
    tree = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            return draw(values())
        path = draw(st.sampled_from(found))
        owner, key = value_at(tree, path[:-1]), path[-1]
        how = draw(
            st.sampled_from(("value", "value", "drop", "text", "list", "move", "rename", "number", "nest", "add"))
        )
        if how == "drop":
            del owner[key]
        elif how == "text":
            owner[key] = str(owner[key])
        elif how == "list":
            owner[key] = [owner[key]] * draw(st.sampled_from((1, 2, 50)))
        elif how == "move":
            owner[key] = copy.deepcopy(value_at(tree, draw(st.sampled_from(found))))
        elif how == "rename" and isinstance(owner, dict):
            owner[draw(st.sampled_from((*KEYS, f"{key}x")))] = owner.pop(key)
        elif how == "number" and isinstance(owner[key], int | float):
            owner[key] = owner[key] * draw(st.sampled_from((-1, 2, 10**9, 0.5))) + draw(st.integers(-1, 1))
        elif how == "nest":
            owner[key] = {"x": owner[key]}
        elif how == "add" and isinstance(owner, dict):
            owner[draw(st.sampled_from((*keys, *KEYS)))] = draw(values())
        else:
            owner[key] = draw(values())
    return tree


BOMBS = (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"", b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"\xff\xfe{\x00")


@st.composite
def json_texts(draw: Draw, document: Any, keys: Sequence[str] = ()) -> bytes:
    """Documents as text, now and then damaged as text."""
    if chance(draw, 60):
        return draw(st.sampled_from(BOMBS))
    text = json.dumps(draw(documents(document, keys)), ensure_ascii=draw(st.booleans()))
    raw = text.encode("utf-8", "surrogatepass")
    return draw(damaged(raw)) if chance(draw, 12) else raw


@st.composite
def damaged(draw: Draw, raw: bytes, focus: int | None = None) -> bytes:
    """Bytes with a few faults, mostly among the first `focus`: flips, numbers, cuts, repeats, insertions, zeros."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        reach = len(data) if focus is None or chance(draw, 10) else min(focus, len(data))
        at = draw(st.integers(0, reach - 1))
        how = draw(st.sampled_from(("flip", "byte", "number", "number", "delete", "insert", "repeat", "cut", "zeros")))
        if how == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte":
            data[at] = draw(st.integers(0, 255))
        elif how == "number":
            width = draw(st.sampled_from((1, 2, 4, 8)))
            number = draw(st.sampled_from(SIZES)) & ((1 << 8 * width) - 1)
            data[at : at + width] = number.to_bytes(width, "little")[: len(data) - at]
        elif how == "delete":
            del data[at : at + draw(st.sampled_from((1, 2, 4, 8, 32, 200)))]
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif how == "repeat":
            data[at:at] = data[at : at + draw(st.sampled_from((1, 4, 16, 64)))]
        elif how == "cut":
            del data[at:]
        else:
            data[at : at + 16] = bytes(len(data[at : at + 16]))
    return bytes(data)


# --- pickles

FOREIGN = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"ctorch\nload\n",
    b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nFloatStorage\n", b"ctorch\nbfloat16\n", b"R", b"b", b"s", b"u",
    b"a", b"e", b"0", b"2", b"(", b"t", b"\x85", b"\x86", b"\x87", b"]", b"}", b")", b"N", b"\x88", b"\x89", b"K\x05",
    b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x10" + b"\xff" * 15 + b"\x7f",
    b"X\x01\x00\x00\x00a", b"h\x00", b"q\x00", b"\x94", b"\x93", b"\x81", b"\x92", b"ios\nsystem\n", b"o", b"Q",
    b"Pabc\n", b"G\x7f\xf8" + bytes(6), b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x00",
    b"\x96\x00\x00\x00\x00\x02\x00\x00\x00", b"\x8f", b"\x90", b"\x91", b"\x95" + bytes(8), b"\x80\x05", b"\x82\x01",
    b"I99999999999\n", b"L" + b"9" * 100 + b"L\n", b"F1e400\n", b".", b"\x97", b"\x98",
)  # fmt: skip


def opcodes(raw: bytes) -> list[bytes]:
    starts = [start for _, _, start in pickletools.genops(raw)]
    return [raw[a:b] for a, b in zip(starts, [*starts[1:], len(raw)], strict=True)]


@st.composite
def pickles(draw: Draw, raw: bytes) -> bytes:
    """Pickles that differ from a valid one in a few opcodes, or bytes."""
    if chance(draw, 5):
        return draw(damaged(raw))
    codes = opcodes(raw)
    for _ in range(draw(st.integers(1, 4))):
        if not codes:
            break
        at = draw(st.integers(0, len(codes) - 1))
        how = draw(st.sampled_from(("replace", "insert", "delete", "swap", "repeat", "number")))
        if how == "replace":
            codes[at] = draw(st.sampled_from(FOREIGN))
        elif how == "insert":
            codes.insert(at, draw(st.sampled_from(FOREIGN)))
        elif how == "delete":
            del codes[at]
        elif how == "swap":
            other = draw(st.integers(0, len(codes) - 1))
            codes[at], codes[other] = codes[other], codes[at]
        elif how == "repeat":
            codes.insert(at, codes[draw(st.integers(0, len(codes) - 1))])
        elif codes[at][:1] in (b"K", b"M", b"J"):
            number = draw(st.sampled_from((*SIZES, -1, -(2**31))))
            codes[at] = b"\x8a\x09" + number.to_bytes(9, "little", signed=True)
        else:
            codes[at] = draw(damaged(codes[at]))
    return b"".join(codes)


def safetensors_of(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data
