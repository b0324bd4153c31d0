"""GGUF files: what we write is read back, and hostile ones are refused before a weight is read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.containers import gguf
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec
from loaders.specs import StoredSpec, StoredTensor
from tests.reading import files_of

METADATA = {
    "general.architecture": gguf.text("llama"),
    "some.numbers": gguf.int32s([1, -2, 3]),
    "some.words": gguf.texts(["a", "b c"]),
    "some.flag": gguf.boolean(True),
    "some.real": gguf.float32(0.5),
}


def write(path: Path, metadata: dict[str, gguf.MetadataValue] | None = None) -> Path:
    """Two tensors: 2 x 32 Q8_0 and three floats."""
    tensors = [
        StoredTensor("a.weight", StoredSpec(DTYPES["Q8_0"], (2, 32))),
        StoredTensor("b.weight", StoredSpec(DTYPES["F32"], (3,))),
    ]
    file = gguf.with_head(gguf.lay_out(path.name, tensors), METADATA if metadata is None else metadata)
    data = bytearray(file.size)
    data[: file.header_bytes] = file.about
    path.write_bytes(data)
    return path


@pytest.mark.quick
def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    a, b = gguf.read_specs(files_of(tmp_path), path.name)
    assert (a.name, a.dtype.name, a.shape, a.size) == ("a.weight", "Q8_0", (2, 32), 68)
    assert (b.name, b.dtype.name, b.shape, b.offset) == ("b.weight", "F32", (3,), a.offset + 96)
    assert a.offset % 32 == 0
    assert gguf.read_metadata(files_of(tmp_path), path.name) == METADATA


def test_gguf_py_reads_it(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf.gguf_reader").GGUFReader(write(tmp_path / "m.gguf"))
    assert [(t.name, t.tensor_type.name, [int(n) for n in t.shape]) for t in reader.tensors] == [
        ("a.weight", "Q8_0", [32, 2]),
        ("b.weight", "F32", [3]),
    ]
    assert reader.fields["some.words"].contents() == ["a", "b c"]


def at(data: bytes, needle: bytes, skip: int = 0) -> int:
    return data.index(needle) + len(needle) + skip


def put(place: Callable[[bytes], int], code: str, value: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        start = place(data)
        raw = struct.pack("<" + code, value)
        return data[:start] + raw + data[start + len(raw) :]

    return damage


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no magic": (lambda d: b"GGML" + d[4:], "does not begin with GGUF"),
    "version 1": (put(lambda d: 4, "I", 1), "of version 1"),
    "big endian": (put(lambda d: 4, "I", 3 << 24), "big-endian"),
    "short": (lambda d: d[:20], "truncated"),
    "cut in the header": (lambda d: d[:60], "truncated|announces"),
    "cut in the data": (lambda d: d[:-40], "truncated"),
    "a lying count of tensors": (put(lambda d: 8, "Q", 1 << 60), "announces"),
    "one tensor more than there is": (put(lambda d: 8, "Q", 3), "wants|announces|dimensions|type|name"),
    "a lying count of entries": (put(lambda d: 16, "Q", 1 << 40), "announces"),
    "a key as long as the world": (put(lambda d: 24, "Q", 1 << 62), "wants"),
    "a string as long as the world": (put(lambda d: at(d, b"general.architecture", 4), "Q", 1 << 63), "wants"),
    "a string in an array as long": (put(lambda d: at(d, b"some.words", 16), "Q", (1 << 64) - 1), "wants"),
    "a name as long as the world": (put(lambda d: d.index(b"a.weight") - 8, "Q", (1 << 64) - 1), "wants"),
    "an offset that wraps": (put(lambda d: at(d, b"b.weight", 16), "Q", (1 << 64) - 32), "truncated"),
    "a tensor without a name": (
        lambda d: d.replace(b"\x08" + bytes(7) + b"b.weight", bytes(8)),
        "is none of a tensor",
    ),
    "an unknown type": (put(lambda d: at(d, b"some.flag"), "I", 13), "unknown type 13"),
    "an array of arrays": (put(lambda d: at(d, b"some.numbers", 4), "I", 9), "unknown type 9"),
    "a lying array": (put(lambda d: at(d, b"some.numbers", 8), "Q", 1 << 61), "announces"),
    "a lying array of strings": (put(lambda d: at(d, b"some.words", 8), "Q", 1 << 61), "announces"),
    "a key twice": (lambda d: d.replace(b"some.real", b"some.flag"), "twice|empty"),
    "five dimensions": (put(lambda d: at(d, b"a.weight"), "I", 5), "5 dimensions"),
    "a shape beyond all files": (put(lambda d: at(d, b"a.weight", 4), "Q", 1 << 63), "expected whole numbers from 0"),
    "a ragged row": (put(lambda d: at(d, b"a.weight", 4), "Q", 33), "does not divide into blocks of 32"),
    "a type that is not read": (put(lambda d: at(d, b"a.weight", 20), "I", 15), "number 15, which is not read"),
    "an offset that is not aligned": (put(lambda d: at(d, b"b.weight", 16), "Q", 97), "not aligned"),
    "one on another": (put(lambda d: at(d, b"b.weight", 16), "Q", 32), "on another"),
    "an offset beyond the file": (put(lambda d: at(d, b"b.weight", 16), "Q", 1 << 50), "truncated"),
    "a name twice": (lambda d: d.replace(b"b.weight", b"a.weight"), "name appears twice"),
    "a name that is no text": (lambda d: d.replace(b"b.weight", b"\xff.weight"), "not UTF-8"),
}


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    path = write(tmp_path / "m.gguf")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadCheckpoint, match=f"m.gguf: .*({message})"):
        gguf.read_specs(files_of(tmp_path), path.name)


def by_hand(version: int, endian: str = "<") -> bytes:
    """A file of one vector and one key, written out without the code that is tested."""

    def string(text: str) -> bytes:
        return struct.pack(endian + "Q", len(text)) + text.encode()

    head = b"GGUF" + struct.pack(endian + "IQQ", version, 1, 2)
    head += string("general.architecture") + struct.pack(endian + "I", 8) + string("llama")
    head += string("some.numbers") + struct.pack(endian + "IIQ2h", 9, 3, 2, 5, -6)
    head += string("a.weight") + struct.pack(endian + "IQIQ", 1, 3, 0, 0)
    head += bytes(-len(head) % 32)
    return head + struct.pack(endian + "3f", 1.5, -2.0, 0.25)


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(version: int, tmp_path: Path) -> None:
    data = by_hand(version)
    (tmp_path / "m.gguf").write_bytes(data)
    [spec] = gguf.read_specs(files_of(tmp_path), "m.gguf")
    assert (spec.name, spec.dtype.name, spec.shape) == ("a.weight", "F32", (3,))
    assert data[spec.offset : spec.offset + spec.size] == struct.pack("<3f", 1.5, -2.0, 0.25)
    found = gguf.plain(gguf.read_metadata(files_of(tmp_path), "m.gguf"))
    assert found == {"general.architecture": "llama", "some.numbers": (5, -6)}


@pytest.mark.parametrize("version", [2, 3])
def test_a_big_endian_file_is_refused_by_its_name(version: int, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(by_hand(version, ">"))
    with pytest.raises(BadCheckpoint, match="m.gguf: a GGUF of a big-endian machine; .* little endian, are read"):
        gguf.read_specs(files_of(tmp_path), "m.gguf")


def test_a_set_of_files_that_lies_of_its_tensors_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m-00001-of-00001.gguf", {**METADATA, **gguf.split_metadata(0, 1, 3)})
    with pytest.raises(BadCheckpoint, match="its model has 3 tensors, its files 2"):
        open_checkpoint(tmp_path)


def test_no_single_wrong_byte_of_a_header_does_more_than_be_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    honest = path.read_bytes()
    for place in range(len(honest) - 128):
        for value in (0, 0x7F, 0xFF):
            path.write_bytes(honest[:place] + bytes([value]) + honest[place + 1 :])
            try:
                specs = gguf.read_specs(files_of(tmp_path), path.name)
            except BadCheckpoint:
                continue
            assert all(spec.offset + spec.size <= len(honest) for spec in specs)


def test_an_odd_alignment_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", {**METADATA, gguf.ALIGNMENT_KEY: gguf.uint32(48)})
    with pytest.raises(BadCheckpoint, match="a power of two"):
        gguf.read_specs(files_of(tmp_path), "m.gguf")


def test_several_models_in_a_folder_are_not_mixed_up(tmp_path: Path) -> None:
    write(tmp_path / "one.gguf")
    write(tmp_path / "two.gguf")
    with pytest.raises(BadSpec, match="2 GGUF files .* give the one that is wanted: "):
        open_checkpoint(tmp_path)


def test_a_split_file_that_lies_of_its_place_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m-00001-of-00001.gguf", {**METADATA, **gguf.split_metadata(1, 2, 2)})
    with pytest.raises(BadCheckpoint, match="it says it is file 1 of 2"):
        open_checkpoint(tmp_path)
