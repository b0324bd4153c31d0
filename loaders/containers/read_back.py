"""Reading a finished file back, once and in order: its hash, and whether all of it is what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import FileIO
from operator import itemgetter

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
        VerifyFailed: a tensor's bytes, or those of the frame around them, are not the ones that were written.
        StorageError: the file cannot be read.
    """
    hashes = dict[str, str]()
    # What is to be found: first byte, length, hashes by the bytes in it, and the slot, or None for a part of the frame.
    wanted: list[tuple[int, int, Mapping[Piece, int], Slot | None]]
    wanted = [(*place_of(slot, places), written[slot.name], slot) for slot in slots]
    wanted += [(at, size, {(0, size): digest}, None) for at, (size, digest) in writer.frame.items()]
    wanted.sort(key=itemgetter(0, 1))
    with io_errors("reading back", writer.path), writer.path.open("rb", buffering=0) as file:
        blocks = _Blocks(file, writer.start, writer.size)
        for start, length, pieces, slot in wanted:
            blocks.skip(start - blocks.at)  # padding between the tensors
            digest = _hash_pieces(blocks, length, pieces)
            if digest is None:
                what = f"{writer.file.name}: what stands around its tensors is not as it was written"
                if slot is not None:
                    what = f"{slot.name}: its bytes in {writer.file.name} are not those that were measured"
                raise VerifyFailed(f"{what}; something changed them on the way to the disk: suspect memory or storage")
            if slot is not None:
                hashes[slot.name] = f"{digest:016x}"
        blocks.skip(writer.size - blocks.at)
    return blocks.whole.hexdigest(), hashes


class _Blocks:
    """The bytes of a file from `start` on, `size` of them, in order; `whole` is the hash of those that were read."""

    def __init__(self, file: FileIO, start: int, size: int) -> None:
        self.whole = xxhash.xxh3_128()
        self.at = 0  # the next byte, from `start`
        self._file = file
        self._size = size
        self._memory = memoryview(bytearray(min(BLOCK, size)))
        self._left = self._memory[:0]  # what was read and not given yet
        file.seek(start)

    def next(self, size: int) -> memoryview:
        """Return the next bytes, which stay until the next call: at most `size`, and none where the file ends."""
        if not self._left:
            left = self._size - self.at
            self._left = self._memory[: self._file.readinto(self._memory[: min(left, len(self._memory))]) or 0]
            self.whole.update(self._left)
        block, self._left = self._left[:size], self._left[size:]
        self.at += len(block)
        return block

    def hash(self, size: int, *beside: xxhash.xxh3_64) -> int:
        """Return the xxh3-64 of the next `size` bytes, which other hashes take, too."""
        block = self.next(size)
        if len(block) == size and not beside:
            return xxhash.xxh3_64_intdigest(block)
        own = xxhash.xxh3_64()
        while block:
            for each in (own, *beside):
                each.update(block)
            size -= len(block)
            block = self.next(size)
        return own.intdigest()

    def skip(self, size: int) -> None:
        while size > 0 and (block := self.next(size)):
            size -= len(block)


def _hash_pieces(blocks: _Blocks, size: int, pieces: Mapping[Piece, int]) -> int | None:
    """Return the xxh3-64 of the next `size` bytes; None if pieces with these hashes are not all of them."""
    if pieces.keys() == {(0, size)}:
        digest = blocks.hash(size)
        return digest if digest == pieces[0, size] else None
    all_of_it, end = xxhash.xxh3_64(), 0
    for (first, last), digest in sorted(pieces.items()):
        if first != end or blocks.hash(last - first, all_of_it) != digest:
            return None
        end = last
    return all_of_it.intdigest() if end == size else None


def place_of(slot: Slot, places: Places) -> tuple[int, int]:
    """Return a slot's first byte in the finished file, and its number of bytes."""
    if slot.within is None:
        return places[slot.name]
    name, offset = slot.within
    return places[name][0] + offset, slot.size
