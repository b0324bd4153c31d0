"""Reading safetensors: what is right is read exactly, what is wrong is refused in one sentence."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from loaders.containers import writer_of
from loaders.containers.read_back import hash_in_order
from loaders.containers.safetensors import header, lay_out, place, read_specs, written_specs
from loaders.containers.writer import SMALL_PIECES
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint
from loaders.specs import StoredSpec, StoredTensor
from tests.making import Raw, write_header, write_safetensors
from tests.reading import files_of

pytestmark = pytest.mark.quick


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(tmp_path: Path, head: Any, data: bytes) -> str:
    write_header(tmp_path / "m.safetensors", head, data)
    with pytest.raises(BadCheckpoint) as caught:
        read_specs(files_of(tmp_path), "m.safetensors")
    assert "m.safetensors" in str(caught.value)
    return str(caught.value)


def test_every_dtype_is_read_with_its_place(tmp_path: Path) -> None:
    tensors = {
        "ids": Raw("I64", np.arange(6).reshape(1, 6)),
        "flag": Raw("BOOL", np.array([1, 0], np.uint8)),
        "eight": Raw("F8_E4M3", np.arange(4, dtype=np.uint8)),
        "scalar": Raw("F32", np.float32(3).reshape(())),
        "none": Raw("BF16", np.empty((0, 4), np.uint16)),
    }
    write_safetensors(tmp_path / "m.safetensors", tensors)
    specs = {spec.name: spec for spec in read_specs(files_of(tmp_path), "m.safetensors")}
    data = (tmp_path / "m.safetensors").read_bytes()
    for name, raw in tensors.items():
        spec = specs[name]
        assert (spec.dtype.name, spec.shape) == (raw.dtype, raw.data.shape)
        assert data[spec.offset : spec.offset + spec.size] == raw.data.tobytes()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    assert "truncated" in refused(tmp_path, {"a": entry()}, b"\0" * 7)


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    assert "1 bytes after the last tensor" in refused(tmp_path, {"a": entry()}, b"\0" * 9)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    said = refused(tmp_path, {"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12)
    assert "'b' overlaps" in said


def test_a_gap_is_refused(tmp_path: Path) -> None:
    said = refused(tmp_path, {"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20)
    assert "leaves 4 bytes unused" in said


def test_offsets_that_do_not_fit_the_shape_are_refused(tmp_path: Path) -> None:
    assert "takes 12 bytes, its offsets hold 8" in refused(tmp_path, {"a": entry(shape=(3,))}, b"\0" * 8)


@pytest.mark.parametrize("shape", [(-1,), (2.0,), ("2",), (True,)])
def test_a_shape_that_is_no_shape_is_refused(tmp_path: Path, shape: Any) -> None:
    assert "whole numbers" in refused(tmp_path, {"a": entry(shape=shape)}, b"\0" * 8)


def test_a_huge_shape_is_refused_without_allocating(tmp_path: Path) -> None:
    assert "more numbers than any file" in refused(tmp_path, {"a": entry(shape=(2**60, 2**60))}, b"\0" * 8)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    assert "unknown dtype 'Q4'" in refused(tmp_path, {"a": entry("Q4")}, b"\0" * 8)


def test_a_tensor_ending_within_a_byte_is_refused(tmp_path: Path) -> None:
    assert "whole bytes" in refused(tmp_path, {"a": entry("F4", (3,), (0, 2))}, b"\0" * 2)


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_an_entry_without_a_part_is_refused(tmp_path: Path, missing: str) -> None:
    broken = {key: value for key, value in entry().items() if key != missing}
    assert "lacks" in refused(tmp_path, {"a": broken}, b"\0" * 8)


@pytest.mark.parametrize("length", [2**63, 100_000_001, 1000])
def test_an_absurd_header_length_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(BadCheckpoint, match=f"header of {length} bytes in a file of 10"):
        read_specs(files_of(tmp_path), "m.safetensors")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(BadCheckpoint, match="in a file of 0"):
        read_specs(files_of(tmp_path), "m.safetensors")


@pytest.mark.parametrize("head", [b"[1, 2]", b"{not json", b'{"a": ' + b"[" * 100_000, b"\xff\xfe"])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, head: bytes) -> None:
    assert "header is not" in refused(tmp_path, head, b"")


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    one = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    assert "'a' appears twice" in refused(tmp_path, f'{{"a":{one},"a":{one}}}'.encode(), b"\0")


def test_a_layout_is_aligned_and_puts_unknown_lengths_last() -> None:
    def tensor(name: str, dtype: str, shape: tuple[int, ...], *, is_bound: bool = False) -> StoredTensor:
        return StoredTensor(name, StoredSpec(DTYPES[dtype], shape, is_bound=is_bound))

    file = lay_out(
        "m.safetensors",
        [
            tensor("b", "U8", (3,)),
            tensor("z", "U8", (9,), is_bound=True),
            tensor("c", "F32", (2,)),
            tensor("a", "BF16", (5,)),
        ],
    )
    assert [slot.name for slot in file.slots] == ["c", "a", "b", "z"]
    assert all(slot.offset % slot.dtype.item_bytes == 0 for slot in file.slots)
    assert file.header_bytes % 8 == 0
    assert file.data_bytes == 8 + 10 + 3 + 9


def test_a_header_fills_the_room_that_was_planned() -> None:
    made = header({"a": (DTYPES["F32"], (2,), 0)}, room=512)
    assert len(made) == 512
    assert struct.unpack("<Q", made[:8])[0] == 504


def test_what_was_written_is_known_without_reading_it(tmp_path: Path) -> None:
    tensors = [
        StoredTensor("part/é", StoredSpec(DTYPES["BF16"], (2, 3))),
        StoredTensor("part/empty", StoredSpec(DTYPES["F32"], (0, 4))),
        StoredTensor("part/scalar", StoredSpec(DTYPES["F32"], ())),
        StoredTensor("part/text", StoredSpec(DTYPES["U8"], (40,), is_bound=True)),
        StoredTensor("part/word", StoredSpec(DTYPES["U8"], (9,), is_bound=True)),
    ]
    file = lay_out("part/m.safetensors", tensors)
    writer = writer_of(tmp_path / "m.safetensors", file)
    data = {slot.name: bytes(range(5 if slot.is_bound else slot.size)) for slot in file.slots}
    for slot in reversed(file.slots):
        writer.write(slot, 0, memoryview(data[slot.name]))
        found = memoryview(bytearray(len(data[slot.name])))
        writer.read(slot, 0, found)
        assert found == data[slot.name]
    places = writer.seal()
    pieces = {name: {(0, len(raw)): xxhash.xxh3_64_intdigest(raw)} for name, raw in data.items()}
    whole, hashes = hash_in_order(writer, file.slots, places, pieces)
    writer.close()
    raw = (tmp_path / "m.safetensors").read_bytes()
    assert whole == xxhash.xxh3_128_hexdigest(raw)
    assert hashes == {name: xxhash.xxh3_64_hexdigest(each) for name, each in data.items()}
    specs = read_specs(files_of(tmp_path), "m.safetensors")
    assert {f"part/{s.name}": raw[s.offset : s.offset + s.size] for s in specs} == data
    assert written_specs(file, place(file, {name: len(each) for name, each in data.items()})) == specs


def test_many_small_pieces_are_all_written(tmp_path: Path) -> None:
    count, size = 3 * SMALL_PIECES, 7
    file = lay_out("m.safetensors", [StoredTensor("w", StoredSpec(DTYPES["U8"], (count * size,)))])
    writer = writer_of(tmp_path / "m.safetensors", file)
    data = np.random.default_rng(0).integers(0, 256, count * size, np.uint8).tobytes()
    for at in range(0, count * size, size)[::-1]:
        writer.write(file.slots[0], at, memoryview(data)[at : at + size])
    writer.seal()
    writer.close()
    assert (tmp_path / "m.safetensors").read_bytes()[file.header_bytes :] == data
