"""Reading a finished file back: its hash in order, and whether every tensor in it is what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import IO

import xxhash

from loaders.containers.base import Places
from loaders.containers.writer import Piece, ShardWriter
from loaders.errors import VerifyFailed, io_errors
from loaders.specs import Slot

# Bytes read at once where a tensor is hashed block by block: few calls, and little memory however large the tensor is.
BLOCK = 4 << 20


def hash_in_order(
    writer: ShardWriter, slots: Sequence[Slot], places: Places, measured: Mapping[str, Mapping[Piece, str]]
) -> tuple[str, dict[str, str]]:
    """Return the xxh3-128 of a sealed file or piece, and the xxh3-64 of each slot's bytes, by the slot's name.

    `slots` are sorted by offset; `measured` has, for each slot, the xxh3-64 of the ranges that measuring read back.

    Raises:
        VerifyFailed: a tensor's bytes are not the ones that were measured.
        StorageError: the file cannot be read.
    """
    path, first = writer.path, writer.start
    whole, hashes = xxhash.xxh3_128(), {}
    with io_errors("reading back", path), path.open("rb", buffering=0) as file:
        file.seek(first)
        for slot in slots:
            start, length = place_of(slot, places)
            whole.update(file.read(first + start - file.tell()))  # header and padding between the tensors
            hasher = xxhash.xxh3_64()

            def take(data: memoryview, hasher: xxhash.xxh3_64 = hasher) -> None:
                whole.update(data)
                hasher.update(data)

            if not _check_in_order(file, length, measured[slot.name], take):
                raise VerifyFailed(
                    f"{slot.name}: its bytes in {writer.file.name} are not those that were measured;"
                    " something changed them on the way to the disk: suspect memory or storage"
                )
            file.seek(first + start + length)
            hashes[slot.name] = hasher.hexdigest()
        while rest := file.read(min(BLOCK, first + writer.size - file.tell())):
            whole.update(rest)
    return whole.hexdigest(), hashes


def _check_in_order(
    file: IO[bytes], size: int, pieces: Mapping[Piece, str], take: Callable[[memoryview], None]
) -> bool:
    """Pass a tensor's bytes to `take` in order; returns whether measured pieces with the same hashes cover them all."""
    # Pieces mostly tile the tensor, and then one read serves both hashes. Pieces that overlap, such as scales that two
    # ranges of weights share, take a second read.
    start, ordered, end = file.tell(), sorted(pieces.items()), 0
    tiles = all(
        piece[0] == before for (piece, _), before in zip(ordered, [0, *(p[1] for p, _ in ordered)], strict=False)
    )
    if tiles and (ordered[-1][0][1] if ordered else 0) == size:
        for (first, last), digest in ordered:
            data = file.read(last - first)
            take(memoryview(data))
            if xxhash.xxh3_64_hexdigest(data) != digest:
                return False
        return True
    for at in range(0, size, BLOCK):
        take(memoryview(file.read(min(BLOCK, size - at))))
    for (first, last), digest in ordered:
        if first > end:
            return False
        end = max(end, last)
        file.seek(start + first)
        if xxhash.xxh3_64_hexdigest(file.read(last - first)) != digest:
            return False
    return end == size


def place_of(slot: Slot, places: Places) -> tuple[int, int]:
    """Return a slot's first byte in the finished file, and its number of bytes."""
    if slot.within is None:
        return places[slot.name]
    name, offset = slot.within
    return places[name][0] + offset, slot.size
