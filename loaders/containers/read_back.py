"""Reading a finished file back, once and in order: its hash, and whether every tensor in it is what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO

import xxhash

from loaders.containers.base import Places
from loaders.containers.writer import Piece, ShardWriter
from loaders.errors import VerifyFailed, io_errors
from loaders.specs import Slot

# Bytes read at once: few calls, and little memory however large a tensor is. Pieces are at most a few times as long.
BLOCK = 4 << 20


def hash_in_order(
    writer: ShardWriter, slots: Sequence[Slot], places: Places, written: Mapping[str, Mapping[Piece, int]]
) -> tuple[str, dict[str, str]]:
    """Return the xxh3-128 of a sealed file or piece, and the xxh3-64 of each slot's bytes, by the slot's name.

    `slots` are sorted by offset; `written` has, for each slot, the xxh3-64 of what was written, by its bytes.

    Raises:
        VerifyFailed: a tensor's bytes are not the ones that were written.
        StorageError: the file cannot be read.
    """
    path, first = writer.path, writer.start
    whole, hashes, buffer = xxhash.xxh3_128(), dict[str, str](), memoryview(bytearray(BLOCK))
    with io_errors("reading back", path), path.open("rb", buffering=0) as file:
        file.seek(first)
        for slot in slots:
            start, length = place_of(slot, places)
            for block in _blocks(file, first + start - file.tell(), buffer):  # header and padding between the tensors
                whole.update(block)
            pieces = sorted(written[slot.name].items())
            digest = _hash_pieces(file, length, pieces, whole.update, buffer)
            if digest is None:
                raise VerifyFailed(
                    f"{slot.name}: its bytes in {writer.file.name} are not those that were measured;"
                    " something changed them on the way to the disk: suspect memory or storage"
                )
            hashes[slot.name] = f"{digest:016x}"
        for block in _blocks(file, first + writer.size - file.tell(), buffer):
            whole.update(block)
    return whole.hexdigest(), hashes


def _hash_pieces(
    file: FileIO,
    size: int,
    pieces: Sequence[tuple[Piece, int]],
    take: Callable[[memoryview], None],
    buffer: memoryview,
) -> int | None:
    """Pass a tensor's bytes to `take` and return their xxh3-64; None if pieces with these hashes are not all of it."""
    all_of_it, end = xxhash.xxh3_64(), 0
    for (first, last), digest in pieces:
        if first != end:
            return None
        piece, end = xxhash.xxh3_64(), last
        for block in _blocks(file, last - first, buffer):
            take(block)
            all_of_it.update(block)
            piece.update(block)
        if piece.intdigest() != digest:
            return None
    return all_of_it.intdigest() if end == size else None


def _blocks(file: FileIO, size: int, buffer: memoryview) -> Iterator[memoryview]:
    """Yield the next bytes of a file in one buffer, block by block; fewer than asked for if the file ends."""
    while size > 0:
        count = file.readinto(buffer[: min(size, len(buffer))])
        if not count:
            return
        yield buffer[:count]
        size -= count


def place_of(slot: Slot, places: Places) -> tuple[int, int]:
    """Return a slot's first byte in the finished file, and its number of bytes."""
    if slot.within is None:
        return places[slot.name]
    name, offset = slot.within
    return places[name][0] + offset, slot.size
