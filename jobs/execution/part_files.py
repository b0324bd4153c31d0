"""A unit's file for one target, from its first byte to its record.

What is measured is what leaves: every piece that measuring reads back is hashed, and when the finished file is hashed
in order, the same pieces must hash the same and cover every tensor whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from jobs.execution.timing import Timer
from jobs.output.journal import Journal, TensorRecord, Written
from jobs.planning.plan import Placement, UnitOutput
from loaders.backends.scratch import Scratch
from loaders.containers import ShardWriter, writer_of
from loaders.containers.base import Places
from loaders.dtypes import storage_of
from loaders.errors import VerifyFailed, io_errors
from loaders.quantization.scheme import Block
from loaders.specs import OutputFile, Slot
from loaders.stats import ErrorSums
from loaders.storage.atomic import sync_folder
from loaders.tensors.logical_tensor import LogicalTensor

HASH_BLOCK = 4 << 20
Piece = tuple[int, int]  # bytes [start, stop) of a tensor


class TensorPart:
    """The slots of one tensor: takes what a scheme stores, gives it back. See `Sink` and `Stored`."""

    def __init__(
        self, writers: Mapping[str, ShardWriter], placement: Placement, scratch: Scratch, timer: Timer
    ) -> None:
        self._writers = writers
        self._slots = placement.slots
        self._scratch = scratch
        self._timer = timer
        self.pieces: dict[str, dict[Piece, str]] = {slot.name: {} for slot in placement.slots.values()}
        for role, data in placement.constants.items():
            slot = placement.slots[role]
            writers[slot.name].write(slot, 0, memoryview(data))
            self.pieces[slot.name][0, len(data)] = xxhash.xxh3_64_hexdigest(data)

    def done(self) -> None:
        """The tensor is whole and measured."""
        for slot in self._slots.values():
            self._writers[slot.name].start_syncing(slot)

    def write(self, role: str, start: int, data: Block) -> None:
        with self._timer.phase("write"):
            raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
            slot = self._slots[role]
            self._writers[slot.name].write(slot, start * data.itemsize, raw)

    def read(self, role: str, start: int, stop: int) -> Block:
        slot = self._slots[role]
        storage = storage_of(slot.dtype)
        first, last = start * storage.itemsize, min(stop * storage.itemsize, slot.size)
        buffer = self._scratch.array(f"back {role}", last - first, np.uint8)
        buffer = buffer[: self._writers[slot.name].read(slot, first, buffer.data)]
        self.pieces[slot.name][first, first + buffer.size] = xxhash.xxh3_64_hexdigest(buffer.data)
        return buffer.view(storage)


@dataclass(frozen=True, slots=True)
class Measured:
    """One tensor, encoded and measured."""

    tensor: LogicalTensor
    action: str
    placement: Placement
    error: ErrorSums


class PartFiles:
    """A unit's files under way: in the journal's folder of parts, or pieces in place in the file they are ranges of.

    In place is for one process only, which the journal's lock keeps alone: its attempts at a unit come one after
    another, and all that an earlier one left is written again.
    """

    def __init__(
        self, journal: Journal, name: str, output: UnitOutput, timer: Timer, scratch: Scratch, *, in_place: bool
    ) -> None:
        self._timer = timer
        self._scratch = scratch  # one for all files of a unit: their buffers take turns
        self._pieces: dict[str, dict[Piece, str]] = {}
        slots = [slot for placement in output.placements for slot in placement.slots.values()]
        self._files: list[PartFile] = []
        self._writers: dict[str, ShardWriter] = {}
        try:
            for number, file in enumerate(output.files):
                own = {slot.name for slot in file.slots}
                mine = [slot for slot in slots if (slot.within or (slot.name,))[0] in own]
                self._files.append(PartFile(journal, f"{name}.{number}", file, mine, in_place=in_place))
                self._writers |= {slot.name: self._files[-1].writer for slot in mine}
        except BaseException:
            self.abort()
            raise

    def tensor(self, placement: Placement) -> TensorPart:
        """Begin a tensor."""
        part = TensorPart(self._writers, placement, self._scratch, self._timer)
        self._pieces.update(part.pieces)
        return part

    def finish(self, measured: list[Measured]) -> tuple[tuple[Written, ...], tuple[TensorRecord, ...]]:
        """Make the files whole and durable and move them among the finished ones: what they are, and their tensors.

        Raises:
            VerifyFailed: a tensor's bytes are not those that were measured.
        """
        places: dict[str, tuple[int, int]] = {}
        hashes: dict[str, str] = {}
        with self._timer.phase("finish"):
            written = tuple(file.finish(self._pieces, places, hashes) for file in self._files)
        return written, tuple(_tensor_record(each, places, hashes) for each in measured)

    def abort(self) -> None:
        """Remove the files, unless they are finished."""
        for file in self._files:
            file.writer.abort()


class PartFile:
    """One of them."""

    def __init__(self, journal: Journal, name: str, file: OutputFile, slots: list[Slot], *, in_place: bool) -> None:
        self._journal = journal
        self._file = file
        self._slots = sorted(slots, key=lambda slot: slot.offset)
        self._in_place = file.within if in_place else None
        if self._in_place is None:
            self.writer = writer_of(journal.parts / name, file)
        else:
            whole, start = self._in_place
            self.writer = writer_of(journal.files / whole, file, start)

    def finish(
        self, pieces: Mapping[str, dict[Piece, str]], places: dict[str, tuple[int, int]], hashes: dict[str, str]
    ) -> Written:
        """Make it whole and durable; adds to `places` and `hashes` what is known of its tensors."""
        mine = self.writer.seal()
        digest, found = self._hash(mine, pieces)
        target = self._journal.place(self._file)
        with io_errors("finishing", target):
            self.writer.close()
            if self._in_place is None:
                target.parent.mkdir(parents=True, exist_ok=True)
                self.writer.path.replace(target)
                sync_folder(target.parent)
            else:
                target.unlink(missing_ok=True)  # of an earlier job of several processes, and not right
        places |= mine
        hashes |= found
        return Written(self._file.name, self.writer.size, digest)

    def _hash(self, places: Places, measured: Mapping[str, dict[Piece, str]]) -> tuple[str, dict[str, str]]:
        """The file's xxh3-128, and the xxh3-64 of each tensor."""
        whole, hashes, path, first = xxhash.xxh3_128(), {}, self.writer.path, self.writer.start
        with io_errors("reading back", path), path.open("rb", buffering=0) as file:
            file.seek(first)
            for slot in self._slots:
                start, size = _place(slot, places)
                whole.update(file.read(first + start - file.tell()))  # what frames it
                pieces = measured[slot.name]
                hasher = xxhash.xxh3_64()

                def take(data: memoryview, hasher: xxhash.xxh3_64 = hasher) -> None:
                    whole.update(data)
                    hasher.update(data)

                if not _check_in_order(file, size, pieces, take):
                    raise VerifyFailed(
                        f"{slot.name}: its bytes in {self._file.name} are not those that were measured;"
                        " something changed them on the way to the disk: suspect memory or storage"
                    )
                file.seek(first + start + size)
                hashes[slot.name] = hasher.hexdigest()
            while rest := file.read(min(HASH_BLOCK, first + self.writer.size - file.tell())):
                whole.update(rest)
            return whole.hexdigest(), hashes


def _check_in_order(file, size: int, pieces: Mapping[Piece, str], take: Callable[[memoryview], None]) -> bool:  # type: ignore[no-untyped-def]
    """Hand a tensor's bytes to `take`, in order; whether they are all covered by pieces that hash as recorded."""
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
    for at in range(0, size, HASH_BLOCK):
        take(memoryview(file.read(min(HASH_BLOCK, size - at))))
    for (first, last), digest in ordered:
        if first > end:
            return False
        end = max(end, last)
        file.seek(start + first)
        if xxhash.xxh3_64_hexdigest(file.read(last - first)) != digest:
            return False
    return end == size


def _place(slot: Slot, places: Places) -> tuple[int, int]:
    """A slot's first byte in the finished file, and how many it has there."""
    if slot.within is None:
        return places[slot.name]
    name, offset = slot.within
    return places[name][0] + offset, slot.size


def _tensor_record(each: Measured, places: Places, hashes: Mapping[str, str]) -> TensorRecord:
    tensor, stored = each.tensor, {}
    for slot in each.placement.slots.values():
        _, size = _place(slot, places)
        shape = slot.shape if not slot.is_bound else (size // slot.dtype.item_bytes,)
        stored[slot.name] = (slot.dtype.name, shape, size, hashes[slot.name])
    return TensorRecord(
        tensor.name, tensor.role, each.action, tensor.dtype.name, tensor.shape, tensor.source_bytes, stored, each.error
    )
