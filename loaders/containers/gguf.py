"""The GGUF container: magic, version, counts, metadata, one entry a tensor, padding, then the tensors, each aligned.

Reading trusts nothing: every count, length, offset and type is checked against what is left of the file before it is
used. Versions 2 and 3, little endian, are read; version 3 is written. GGUF lists dimensions from the fastest on; shapes
here have the fastest last, as everywhere else in this project.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the limits are those of llama.cpp's gguf.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from loaders.containers.base import Checksum, Places
from loaders.containers.gguf_types import check_metadata
from loaders.dtypes import DTYPES, DType
from loaders.errors import BadCheckpoint, BadSpec
from loaders.limits import (
    GGUF_DIMENSIONS,
    GGUF_HEADER,
    GGUF_ITEMS,
    GGUF_KEYS,
    GGUF_NAME,
    GGUF_TEXT,
    check_name,
    check_shape,
    check_tensors,
    shown,
)  # fmt: skip
from loaders.specs import OutputFile, Slot, StoredTensor, WeightSpec
from loaders.storage.base import PinnedFiles

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
ALIGNMENT_KEY = "general.alignment"
STRING, ARRAY = 8, 9
# gguf_metadata_value_type -> struct's letter
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# ggml_type; those without an entry in DTYPES cannot be read
TYPE_IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "IQ1_M": 29, "BF16": 30,
    "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip
TYPE_NAMES = {number: name for name, number in TYPE_IDS.items()}
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """A value of the metadata. `type` is its gguf_metadata_value_type; for an array, that of the items."""

    type: int
    value: Any
    is_array: bool = False


Metadata = Mapping[str, MetadataValue]


def text(value: str) -> MetadataValue:
    return MetadataValue(STRING, value)


def uint32(value: int) -> MetadataValue:
    return MetadataValue(4, value)


def float32(value: float) -> MetadataValue:
    return MetadataValue(6, value)


def boolean(value: bool) -> MetadataValue:
    return MetadataValue(7, value)


def booleans(values: Sequence[bool]) -> MetadataValue:
    return MetadataValue(7, tuple(values), is_array=True)


def texts(values: Sequence[str]) -> MetadataValue:
    return MetadataValue(STRING, tuple(values), is_array=True)


def int32s(values: Sequence[int]) -> MetadataValue:
    return MetadataValue(5, tuple(values), is_array=True)


def uint8s(values: bytes) -> MetadataValue:
    return MetadataValue(0, tuple(values), is_array=True)


def float32s(values: Sequence[float]) -> MetadataValue:
    return MetadataValue(6, tuple(values), is_array=True)


def plain(metadata: Metadata) -> dict[str, Any]:
    """Return the values alone, without their types."""
    return {key: entry.value for key, entry in metadata.items()}


# --- reading


def read_specs(files: PinnedFiles, file: str) -> tuple[WeightSpec, ...]:
    """Read the tensors of one file from its header, in the order of their bytes.

    Raises:
        BadCheckpoint: truncated, overlapping, out of range, unknown type, absurd counts, ...
    """
    return _read(files, file)[1]


def read_metadata(files: PinnedFiles, file: str) -> dict[str, MetadataValue]:
    """Read the metadata of one file. Raises BadCheckpoint as `read_specs` does."""
    return _read(files, file)[0]


def _read(files: PinnedFiles, file: str) -> tuple[dict[str, MetadataValue], tuple[WeightSpec, ...]]:
    size = files.entry(file).size
    if size < 24:  # magic, version and two counts
        raise BadCheckpoint(f"{file}: {size} bytes; not GGUF, or truncated: fetch it again")
    with files.open(file) as data:
        try:
            return _Header(file, data, size).read()
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{file}: {error}") from None


class _Header:
    """A cursor over the bytes of a file that is not to be trusted."""

    def __init__(self, file: str, data: IO[bytes], size: int) -> None:
        self._file = file
        self._data = data
        self._size = size
        self._at = 0
        self._left = GGUF_ITEMS

    def read(self) -> tuple[dict[str, MetadataValue], tuple[WeightSpec, ...]]:
        if self._take(4) != MAGIC:
            raise BadCheckpoint("it does not begin with GGUF; fetch it again")
        version = self._number("I")
        if version not in (2, 3):
            # Versions are small, so one whose low half is zero was written in the other byte order; llama.cpp's
            # gguf.cpp tests the same.
            swapped = version & 0xFFFF == 0
            what = "of a big-endian machine" if swapped else f"of version {version}"
            raise BadCheckpoint(f"a GGUF {what}; versions 2 and 3, little endian, are read")
        # The least that an entry takes: 32 bytes for a tensor of one dimension, 13 for a value of metadata.
        tensors, entries = self._count(32), self._count(13)
        check_tensors(tensors, "its header")
        if entries > GGUF_KEYS:
            raise BadCheckpoint(f"it announces {entries} entries of metadata, at most {GGUF_KEYS} are read")
        metadata: dict[str, MetadataValue] = {}
        for _ in range(entries):
            key = self._string("a key")
            if not key or key in metadata:
                raise BadCheckpoint(f"metadata key {shown(key)} is empty or appears twice")
            metadata[key] = self._entry(key)
        check_metadata(plain(metadata))
        alignment = metadata.get(ALIGNMENT_KEY, uint32(ALIGNMENT))
        step = alignment.value
        if alignment.type != 4 or alignment.is_array or step < 1 or step & (step - 1):
            raise BadCheckpoint(f"{ALIGNMENT_KEY} is {shown(step)}; a power of two is expected")
        found = [self._tensor() for _ in range(tensors)]
        return metadata, self._place(found, -(-self._at // step) * step, step)

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise BadCheckpoint(
                f"its header wants {count} bytes at byte {self._at} of {self._size}; truncated? fetch it again"
            )
        self._at += count
        if self._at > GGUF_HEADER:
            raise BadCheckpoint(f"its header has more than {GGUF_HEADER} bytes, which are not read")
        return self._data.read(count)

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _count(self, least: int) -> int:
        """Read a count of things that take at least `least` bytes each, so that the rest of the file bounds it."""
        count = int(self._number("Q"))
        if count > (self._size - self._at) // least:
            raise BadCheckpoint(f"it announces {count} entries in the {self._size - self._at} bytes that are left")
        return count

    def _items(self, least: int) -> int:
        """Read the count of an array's items."""
        count = self._count(least)
        self._left -= count
        if self._left < 0:
            raise BadCheckpoint(f"its arrays of metadata have more than {GGUF_ITEMS} items, which are not read")
        return count

    def _string(self, what: str) -> str:
        size = self._number("Q")
        if GGUF_TEXT < size <= self._size - self._at:
            raise BadCheckpoint(f"{shown(what)} is a text of {size} bytes, at most {GGUF_TEXT} are read")
        raw = self._take(size)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            if what == "a key" or what == "a tensor's name":
                raise BadCheckpoint(f"{what} is not UTF-8: {raw[:40]!r}") from None
            # Some vocabularies hold tokens that are not UTF-8; escaped so, `_string_bytes` writes them back as they
            # were.
            return raw.decode(errors="surrogateescape")

    def _entry(self, key: str) -> MetadataValue:
        kind, is_array = self._number("I"), False
        if kind == ARRAY:
            kind, is_array = self._number("I"), True
        if kind != STRING and kind not in SCALARS:
            raise BadCheckpoint(f"metadata key {shown(key)} has the unknown type {kind}")
        if not is_array:
            return MetadataValue(kind, self._string(key) if kind == STRING else self._number(SCALARS[kind]))
        if kind == STRING:
            return MetadataValue(kind, tuple(self._string(key) for _ in range(self._items(8))), True)
        item = struct.calcsize("<" + SCALARS[kind])
        count = self._items(item)
        return MetadataValue(kind, struct.unpack(f"<{count}{SCALARS[kind]}", self._take(count * item)), True)

    def _tensor(self) -> tuple[str, DType, tuple[int, ...], int]:
        name = check_name(self._string("a tensor's name"))
        if len(name.encode()) > GGUF_NAME:
            raise BadCheckpoint(f"the name {shown(name)} is longer than {GGUF_NAME} bytes, which llama.cpp refuses")
        dimensions = self._number("I")
        if dimensions > GGUF_DIMENSIONS:
            raise BadCheckpoint(f"tensor {name!r} has {dimensions} dimensions; at most {GGUF_DIMENSIONS} are known")
        shape = tuple(int(self._number("Q")) for _ in range(dimensions))[::-1]
        kind, offset = self._number("I"), self._number("Q")
        type_name = TYPE_NAMES.get(kind, f"number {kind}")
        if type_name not in DTYPES:
            readable = ", ".join(n for n in TYPE_IDS if n in DTYPES)
            raise BadCheckpoint(f"{name!r} is of ggml's type {type_name}, which is not read; these are: {readable}")
        try:
            check_shape(shape)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{name!r}: {error}") from None
        return name, DTYPES[type_name], shape, offset

    def _place(
        self, found: Sequence[tuple[str, DType, tuple[int, ...], int]], start: int, step: int
    ) -> tuple[WeightSpec, ...]:
        """Check the places of the tensors, and return their specs sorted by offset."""
        specs, end = [], start
        for name, dtype, shape, offset in sorted(found, key=lambda each: each[3]):
            try:
                size = dtype.size(shape)
            except BadCheckpoint as error:
                raise BadCheckpoint(f"{name!r}: {error}") from None
            if offset % step or start + offset < end:
                raise BadCheckpoint(f"{name!r} begins at {offset} of the data: not aligned to {step}, or on another")
            end = start + offset + size
            if end > self._size:
                raise BadCheckpoint(f"{name!r} ends at byte {end} of {self._size}; truncated? fetch it again")
            specs.append(
                WeightSpec(name=name, dtype=dtype, shape=shape, file=self._file, offset=start + offset, size=size)
            )
        if len({spec.name for spec in specs}) < len(specs):
            raise BadCheckpoint("a tensor's name appears twice")
        return tuple(specs)


# --- writing


def lay_out(file: str, tensors: Iterable[StoredTensor], about: Any = None) -> OutputFile:
    """Give every tensor its place, aligned, in the order given. The file has no header yet: see `with_head`.

    Raises:
        BadSpec: a name is too long, or GGUF has no such dtype.
    """
    whole = {tensor.name: tensor.whole or tensor.spec for tensor in tensors}
    slots, offset = [], 0
    for name, spec in whole.items():
        if spec.dtype.name not in TYPE_IDS or len(name.encode()) > GGUF_NAME or len(spec.shape) > GGUF_DIMENSIONS:
            raise BadSpec(f"{name}: {spec.dtype} {list(spec.shape)} under this name cannot be in a GGUF")
        slots.append(Slot(name=name, dtype=spec.dtype, shape=spec.shape, offset=offset))
        offset += -(-spec.size // ALIGNMENT) * ALIGNMENT
    return OutputFile(name=file, header_bytes=0, data_bytes=offset, slots=tuple(slots), container="gguf", about=about)


def with_head(file: OutputFile, metadata: Metadata) -> OutputFile:
    """Return a planned file with its header before its data. A piece of a file stays without one."""
    head = header(metadata, [(slot, slot.offset) for slot in file.slots])
    return replace(file, about=head, header_bytes=len(head))


def place(file: OutputFile, lengths: Mapping[str, int]) -> Places:
    """Return the places of the tensors, which are those that were planned."""
    return {slot.name: (file.header_bytes + slot.offset, slot.size) for slot in file.slots}


def frame(file: OutputFile, places: Places, checksum: Checksum) -> list[tuple[int, bytes]]:
    """Return the header, if the file has one, and the zeros that align what comes after the last tensor."""
    end, last = file.header_bytes + file.data_bytes, max((at + size for at, size in places.values()), default=0)
    head = [(0, bytes(file.about))] if file.about is not None else []
    return [*head, (last, bytes(end - last))]


def header(metadata: Metadata, tensors: Sequence[tuple[Slot, int]]) -> bytes:
    """Return the first bytes of a file: metadata, and the tensors with their offsets among the data; padded."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, entry in metadata.items():
        parts += [_string_bytes(key), _entry_bytes(entry)]
    for slot, offset in tensors:
        shape = slot.shape[::-1]
        parts.append(_string_bytes(slot.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", TYPE_IDS[slot.dtype.name], offset))
    raw = b"".join(parts)
    return raw + bytes(-len(raw) % ALIGNMENT)


def _string_bytes(value: str) -> bytes:
    raw = value.encode(errors="surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _entry_bytes(entry: MetadataValue) -> bytes:
    if not entry.is_array:
        head = struct.pack("<I", entry.type)
        return head + (
            _string_bytes(entry.value) if entry.type == STRING else struct.pack("<" + SCALARS[entry.type], entry.value)
        )
    head = struct.pack("<IIQ", ARRAY, entry.type, len(entry.value))
    if entry.type == STRING:
        return head + b"".join(_string_bytes(value) for value in entry.value)
    return head + struct.pack(f"<{len(entry.value)}{SCALARS[entry.type]}", *entry.value)


def split_metadata(number: int, count: int, tensors: int) -> dict[str, MetadataValue]:
    """Return the metadata by which llama.cpp joins a split model: this file's number from 0, and counts over all files.

    The types are those of llama.cpp's gguf-split: uint16, and int32 for the number of tensors.
    """
    return {
        SPLIT_NUMBER: MetadataValue(2, number),
        SPLIT_COUNT: MetadataValue(2, count),
        SPLIT_TENSORS: MetadataValue(5, tensors),
    }
