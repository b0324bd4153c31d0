"""Reading an importance matrix: llama.cpp's GGUF form, and the .dat files of before 2025.

Nothing in a file is trusted: names, counts and sizes are held against what is left of it before they are used, and all
its numbers must be finite. The file is read once more from its first byte to its last, for that and for its digest; no
more of it is in memory than a block.

Source: llama.cpp, common/imatrix-loader.cpp; tools/imatrix/imatrix.cpp writes both forms.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from typing import IO

import numpy as np
import xxhash

from loaders.containers import gguf
from loaders.errors import BadCheckpoint, MissingFile, setting
from loaders.imatrix.matrix import ImportanceMatrix, MatrixFile, Sums
from loaders.limits import GGUF_TEXT, MOST_TENSORS, PACKED_EXPERTS, check_name, shown
from loaders.specs import WeightSpec
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import PinnedFiles

SUMS, COUNTS = ".in_sum2", ".counts"  # what the names of tensors end in, after the name of the model's tensor
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
UINT32 = 4  # gguf_metadata_value_type
BLOCK = 1 << 22  # bytes that are checked at once
LARGEST_COUNT = 2.0**62  # llama.cpp rounds counts to int64


def open_matrix(where: str | os.PathLike[str] | Address) -> ImportanceMatrix:
    """Open an importance matrix: a path, or the URL of a file in any store.

    Raises:
        MissingFile: there is none.
        BadCheckpoint: it is damaged, or no importance matrix.
        StorageError: it cannot be read.
    """
    address = Address.of(where)
    files, name = PinnedFiles(open_store(address.parent)), address.name
    if files.find(name) is None:
        raise MissingFile(f"{setting('imatrix')}: {address} is not there; give the file of an importance matrix")
    entry = files.entry(name)
    with files.open(name) as data:
        is_gguf = data.read(4) == gguf.MAGIC
        try:
            sums, datasets, chunks = _gguf(files, name) if is_gguf else _legacy(data, entry.size)
            if not sums:
                raise BadCheckpoint("it holds no sums")
            data.seek(0)
            digest = _checked(data, entry.size, sums)
        except BadCheckpoint as error:
            said = str(error).removeprefix(f"{name}: ")
            raise BadCheckpoint(f"{name}: no importance matrix that can be used: {said}") from None
    return ImportanceMatrix(file=MatrixFile(address.parent, entry, digest), sums=sums, datasets=datasets, chunks=chunks)


# --- the GGUF form


def _gguf(files: PinnedFiles, name: str) -> tuple[dict[str, Sums], tuple[str, ...], int]:
    metadata = gguf.read_metadata(files, name)
    missing = [key for key in (DATASETS, CHUNKS, CHUNK_SIZE) if key not in metadata]
    if missing:
        raise BadCheckpoint(f"a GGUF without {', '.join(missing)}, which llama-imatrix writes and llama-quantize wants")
    datasets, chunks = metadata[DATASETS], metadata[CHUNKS]
    if datasets.type != gguf.STRING or not datasets.is_array:
        raise BadCheckpoint(f"{DATASETS} is no array of texts")
    if chunks.type != UINT32 or chunks.is_array:
        raise BadCheckpoint(f"{CHUNKS} is no uint32")
    specs = {spec.name: spec for spec in gguf.read_specs(files, name)}
    names = sorted({each.removesuffix(end) for each in specs for end in (SUMS, COUNTS) if each.endswith(end)})
    sums = {each: _sums(files, each, specs) for each in names}
    return sums, tuple(datasets.value), chunks.value


def _sums(files: PinnedFiles, name: str, specs: Mapping[str, WeightSpec]) -> Sums:
    check_name(name)
    found, counted = specs.get(name + SUMS), specs.get(name + COUNTS)
    if found is None or counted is None:
        raise BadCheckpoint(
            f"{name} has {COUNTS if found is None else SUMS} without {SUMS if found is None else COUNTS}"
        )
    for spec in (found, counted):
        if spec.dtype.name != "F32":
            raise BadCheckpoint(f"{spec.name} is {spec.dtype}; sums and counts are F32")
    numbers, parts = found.numel(), counted.numel()
    if not 0 < parts <= PACKED_EXPERTS or numbers == 0 or numbers % parts:
        raise BadCheckpoint(
            f"{name} has {numbers} sums and {parts} counts; a count is of as many sums as the others, and there are at"
            f" most {PACKED_EXPERTS}"
        )
    raw = np.frombuffer(files.read(counted.file, counted.offset, counted.offset + counted.size), "<f4")
    if not (np.isfinite(raw).all() and (raw >= 0).all() and (raw <= LARGEST_COUNT).all()):
        wrong = next(float(each) for each in raw if not 0 <= each <= LARGEST_COUNT)
        raise BadCheckpoint(f"{name} was counted {wrong:g} times; expected a number of tokens")
    # llama.cpp rounds as C's lround, halves away from zero; no float32 of 2^24 and more has halves.
    return Sums(found.offset, numbers, tuple(float(np.float32(math.floor(float(each) + 0.5))) for each in raw))


# --- the old form


def _legacy(data: IO[bytes], size: int) -> tuple[dict[str, Sums], tuple[str, ...], int]:
    """Read each entry's name, calls and numbers, then the number of chunks and the dataset; lengths are int32."""
    data.seek(0)
    entries, sums = _int32(data, size), dict[str, Sums]()
    if not 0 < entries <= MOST_TENSORS:
        raise BadCheckpoint(
            f"it is no GGUF, and as an old file (.dat) it announces {entries} tensors; expected 1 to {MOST_TENSORS}"
        )
    for index in range(entries):
        length = _int32(data, size)
        if not 0 < length <= size - data.tell():
            raise BadCheckpoint(f"the name of entry {index} has {length} bytes; truncated, or another kind of file")
        name = _name(data.read(length))
        calls, numbers = _int32(data, size), _int32(data, size)
        at = data.tell()
        if numbers < 1 or 4 * numbers > size - at:
            raise BadCheckpoint(
                f"{shown(name)} has {numbers} numbers, and the file {size - at} bytes from there on; truncated? fetch"
                " it again"
            )
        if name in sums:
            raise BadCheckpoint(f"{name} appears twice")
        # These sums are the mean over tokens, times the calls; without calls they are taken as they are.
        sums[name] = Sums(at, numbers, (float(max(calls, 1)),))
        data.seek(at + 4 * numbers)
    if size - data.tell() < 4:  # files of before 2023-12
        return sums, (), 0
    chunks = _int32(data, size)
    length = _int32(data, size) if size - data.tell() >= 4 else 0
    if not 0 <= length <= min(size - data.tell(), GGUF_TEXT):
        raise BadCheckpoint(f"the name of its dataset has {length} bytes; truncated? fetch it again")
    datasets = (data.read(length).partition(b"\0")[0].decode(errors="replace"),) if length else ()
    return sums, datasets, max(0, chunks)


def _int32(data: IO[bytes], size: int) -> int:
    if size - data.tell() < 4:
        raise BadCheckpoint(f"it ends at byte {size}, within an entry; truncated? fetch it again")
    return int(struct.unpack("<i", data.read(4))[0])


def _name(raw: bytes) -> str:
    try:
        return check_name(raw.partition(b"\0")[0].decode())
    except UnicodeDecodeError:
        raise BadCheckpoint(f"a name is no text: {raw[:40]!r}") from None


# --- both


def _checked(data: IO[bytes], size: int, sums: Mapping[str, Sums]) -> str:
    """Check that all sums are finite; return the xxh3-128 of the file's bytes."""
    hasher = xxhash.xxh3_128()
    for name, start, stop in _pieces(sums, size):
        for at in range(start, stop, BLOCK):
            raw = data.read(min(BLOCK, stop - at))
            hasher.update(raw)
            if name is not None:
                numbers = np.frombuffer(raw, "<f4")
                if not np.isfinite(numbers).all():
                    wrong = (at - start) // 4 + int(np.argmin(np.isfinite(numbers)))
                    raise BadCheckpoint(f"{name}: number {wrong} is NaN or infinite; measure it anew")
    return hasher.hexdigest()


def _pieces(sums: Mapping[str, Sums], size: int) -> Iterable[tuple[str | None, int, int]]:
    """Yield the bytes of a file in order: those of a tensor's sums with its name, and those between without."""
    last = 0
    for name, each in sorted(sums.items(), key=lambda item: item[1].offset):
        yield None, last, each.offset
        last = each.offset + 4 * each.numbers
        yield name, each.offset, last
    yield None, last, size
