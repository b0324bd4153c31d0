"""The files that a unit writes for one target, until they are finished."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.output.journal import Journal, Written, WrittenTensor
from jobs.planning.plan import Placement, UnitOutput
from loaders.backends.scratch import Scratch
from loaders.clock import Clock
from loaders.containers import ShardWriter, writer_of
from loaders.containers.base import Places
from loaders.containers.read_back import hash_in_order, place_of
from loaders.containers.writer import Piece, TensorSink
from loaders.specs import OutputFile, Slot
from loaders.storage.base import READ_BEFORE_PUBLISHING


class PartFiles:
    """The files that a unit is writing: part files in the journal, or pieces written in place into a shared file.

    Writing in place is for a single process, which the journal's lock guarantees. Attempts at a unit then follow one
    another, and each writes all its bytes again, so that nothing of a failed attempt remains.
    """

    def __init__(
        self, journal: Journal, name: str, output: UnitOutput, clock: Clock, scratch: Scratch, *, in_place: bool
    ) -> None:
        self._clock = clock
        self._scratch = scratch  # shared by all targets of a unit: a thread encodes for one after another
        self._pieces: dict[str, dict[Piece, int]] = {}
        self._slots = [slot for placement in output.placements for slot in placement.slots.values()]
        self._files: list[PartFile] = []
        self._writers: dict[str, ShardWriter] = {}
        try:
            for number, file in enumerate(output.files):
                own = {slot.name for slot in file.slots}
                mine = [slot for slot in self._slots if (slot.within or (slot.name,))[0] in own]
                self._files.append(PartFile(journal, f"{name}.{number}", file, mine, clock, in_place=in_place))
                self._writers |= {slot.name: self._files[-1].writer for slot in mine}
        except BaseException:
            self.abort()
            raise

    def tensor(self, placement: Placement) -> TensorSink:
        """Return the sink for a tensor's stored parts."""
        sink = TensorSink(self._writers, placement.slots, placement.constants, self._scratch.array)
        self._pieces.update(sink.pieces)
        return sink

    def finish(self) -> tuple[tuple[Written, ...], Mapping[str, WrittenTensor]]:
        """Complete the files, sync them and move them to the finished ones; returns the records of files and of stored
        tensors, the latter by name.

        Raises:
            VerifyFailed: a tensor's bytes are not the ones that were written.
        """
        places: dict[str, tuple[int, int]] = {}
        hashes: dict[str, str] = {}
        with self._clock.phase("write"):
            written = tuple(file.finish(self._pieces, places, hashes) for file in self._files)
        return written, {slot.name: _written(slot, places, hashes[slot.name]) for slot in self._slots}

    def abort(self) -> None:
        """Remove the files, unless they are finished."""
        for file in self._files:
            file.writer.abort()


class PartFile:
    """One file, or piece of a file, that a unit is writing."""

    def __init__(
        self, journal: Journal, name: str, file: OutputFile, slots: list[Slot], clock: Clock, *, in_place: bool
    ) -> None:
        self._journal = journal
        self._clock = clock
        self._file = file
        self._slots = sorted(slots, key=lambda slot: slot.offset)
        self._part = journal.destination.scratch(name)
        whole, start = file.within if file.within is not None and in_place else ("", 0)
        self._shared = journal.destination.shared(f"files/{whole}") if whole else None
        if self._shared is None:
            self.writer = writer_of(self._part, file, clock=clock)
        else:
            self.writer = writer_of(self._shared, file, start, clock)

    def finish(
        self, pieces: Mapping[str, Mapping[Piece, int]], places: dict[str, tuple[int, int]], hashes: dict[str, str]
    ) -> Written:
        """Complete and sync the file; adds its tensors' places and hashes to `places` and `hashes`."""
        writer = self.writer
        mine = writer.seal()
        digest, found = hash_in_order(writer, self._slots, mine, pieces)
        writer.close()
        destination, name, tag = self._journal.destination, self._journal.place(self._file), ""
        if self._shared is None:
            places_of_slots = (place_of(slot, mine) for slot in self._slots)
            large = [(start, start + size) for start, size in places_of_slots if size > READ_BEFORE_PUBLISHING]
            with self._clock.phase("write" if destination.is_local else "upload"):
                tag = destination.keep(self._part, name, large).tag
        else:
            # An interrupted run on several processes may have left this piece as a file, which `find` would prefer.
            destination.drop(name)
        places |= mine
        hashes |= found
        return Written(self._file.name, writer.size, digest, tag)


def _written(slot: Slot, places: Places, digest: str) -> WrittenTensor:
    _, size = place_of(slot, places)
    shape = slot.shape if not slot.is_bound else (size // slot.dtype.item_bytes,)
    return slot.dtype.name, shape, size, digest
