"""Open files of a checkpoint, and positioned reads of their bytes into memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from loaders.backends.scratch import Scratch
from loaders.errors import StorageError, io_errors
from loaders.specs import WeightSpec
from loaders.storage import local
from loaders.storage.read_limit import before_reading, is_limited
from loaders.strategies.base import cut_short
from loaders.strategies.lazy import MappedFiles, map_privately

AHEAD = 16 << 20  # bytes beyond a range that the kernel is asked to fetch: its own read-ahead is far shorter
LONG = 1 << 20  # bytes from which on a read is worth asking for what follows it


class OpenFiles:
    """A `Reader` by descriptors, each opened at its first use; any thread may read."""

    def __init__(self, root: Path, readahead: int = AHEAD) -> None:
        self._root = root
        self.readahead = readahead
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._scratch = Scratch()
        self._maps = MappedFiles(root)

    def descriptor(self, file: str) -> int:
        """Return a file's descriptor, and open the file at its first use."""
        found = self._descriptors.get(file)
        if found is not None:
            return found
        with self._lock, io_errors("opening", self._root / file):
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self._root / file, os.O_RDONLY)
            return self._descriptors[file]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def advise(self, spec: WeightSpec, start: int, stop: int) -> None:
        """Ask the kernel to begin to fetch a range, if the system can be asked and reading is not limited."""
        if not is_limited() and hasattr(os, "posix_fadvise"):
            with io_errors("reading", self._root / spec.file):
                descriptor = self.descriptor(spec.file)
                os.posix_fadvise(descriptor, spec.offset + start, stop - start, os.POSIX_FADV_WILLNEED)

    def fill(self, spec: WeightSpec, start: int, out: np.ndarray) -> None:
        """Read bytes from `start` of a tensor on into `out` (uint8), as many as it holds.

        Raises:
            BadCheckpoint: the file ends before.
            StorageError: it cannot be read.
        """
        descriptor, at, left = self.descriptor(spec.file), spec.offset + start, out.data
        self._wait_for(spec, start, start + out.nbytes)
        with io_errors("reading", self._root / spec.file):
            while left:
                count = os.preadv(descriptor, [left], at)
                if count == 0:
                    raise cut_short(spec, at)
                at, left = at + count, left[count:]

    def _wait_for(self, spec: WeightSpec, start: int, stop: int) -> None:
        """Wait until a range may be read, if reading is limited; what the page cache holds is not read."""
        if is_limited() and not self.is_cached(spec, start, stop):
            before_reading(stop - start)

    def fetch(self, spec: WeightSpec, start: int, stop: int) -> None:
        """Bring a range into the page cache. Errors as `fill`."""
        self._wait_for(spec, start, stop)
        with io_errors("reading", self._root / spec.file):
            end = local.fetch(self.descriptor(spec.file), spec.offset + start, spec.offset + stop)
        if end is not None and end < spec.offset + stop:
            raise cut_short(spec, end)
        if end is None and not self.is_cached(spec, start, stop):
            for at in range(start, stop, LONG):
                self.fill(spec, at, self._scratch.array("fetched", min(LONG, stop - at), np.uint8))

    def is_cached(self, spec: WeightSpec, start: int, stop: int) -> bool:
        """Whether the page cache holds a range, as far as samples tell; False where the system does not tell."""
        with io_errors("reading", self._root / spec.file):
            return local.cached_part(self.descriptor(spec.file), spec.offset + start, spec.offset + stop) == 1

    def in_place(self, spec: WeightSpec, start: int, stop: int) -> np.ndarray | None:
        """Return a range as a private map if the page cache holds it, and None otherwise.

        A copy would move each byte three times, and need memory of its own.
        """
        if stop - start < LONG or not self.is_cached(spec, start, stop):
            return None
        # A map beyond the end of a file that was cut short would kill the process at its first use.
        if os.fstat(self.descriptor(spec.file)).st_size < spec.offset + stop:
            return None
        try:
            return map_privately(self._root / spec.file, spec.offset + start, spec.offset + stop)
        # Private maps count towards RLIMIT_DATA, so the system may refuse one; then the range is read.
        except StorageError:
            return None

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        out = self._scratch.array(f"read {slot}", stop - start, np.uint8)
        # The kernel's own read-ahead is enough for short reads, for each of which a call would take longer than it.
        if self.readahead and stop - start >= LONG:
            self.advise(spec, stop, stop + self.readahead)
        self.fill(spec, start, out)
        return out

    def mapped(self, spec: WeightSpec, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._maps.mapped(spec, start, stop)
