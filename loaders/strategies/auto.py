"""`auto`: the choice of a strategy by where files are stored, what of them is cached, the device, and measured rates.

Rates are measured only where they matter: for whole tensors of large files on a local disk that are mostly not cached.
Measuring takes a fraction of a second, reads pages that are needed anyway, and is done once for each disk in a process.
A job, which begins to fetch as soon as it knows what it reads, would lose more by it than the best way can win.
"""

from __future__ import annotations

import importlib.util
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loaders.backends.devices import backend
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import io_errors
from loaders.specs import WeightSpec
from loaders.storage import local
from loaders.storage.base import PinnedFiles
from loaders.strategies.base import PieceReader, WeightLoader, cached_share, local_root
from loaders.strategies.fastsafetensors import FastSafetensorsLoader, gds_available
from loaders.strategies.lazy import LazyLoader, map_file
from loaders.strategies.multithread import MultiThreadWeightLoader
from loaders.strategies.read import ReadLoader
from loaders.strategies.remote import RemoteLoader

log = logging.getLogger("weightmill")
MOSTLY = 0.5  # the share of cached pages from which on a map is taken without measuring
WORTH_MEASURING = 1 << 30  # bytes; for less, the difference would not pay for measuring
PROBE_S = 0.12  # seconds for each way of reading: short beside any file that is worth it, long beside one request
PROBE_BYTES = 128 << 20  # bytes read for each way at most, which a fast disk reads in less time
CHUNK = 8 << 20  # bytes of one read, as in reading/read_ahead.py
BY_NAME: dict[str, Callable[[], WeightLoader]] = {
    "lazy": LazyLoader, "read": ReadLoader, "multithread": MultiThreadWeightLoader,
    "fastsafetensors": FastSafetensorsLoader, "remote": RemoteLoader,
}  # fmt: skip
_RATES: dict[int, dict[str, float]] = {}  # GB/s by way, of each disk, as this process found them


def choose(
    source: PinnedFiles, files: Sequence[str], device: str | None = None, *, by_ranges: bool = False
) -> tuple[str, str]:
    """Return the name of a strategy for some files of a source, and the reason in a few words.

    `device` is the device that whole tensors are loaded to. `by_ranges` says that ranges are read from several threads,
    as a job does.
    """
    if not source.store.is_local:
        return "remote", f"the files lie in no folder of this machine, but at {source.address}"
    if device is not None and device.startswith("cuda") and _all_safetensors(files) and _has_fastsafetensors():
        index = int(device.partition(":")[2] or 0)
        if gds_available(index):
            return "fastsafetensors", "GPU direct storage is there, and goes past the CPU's memory"
    root = local_root(source, "auto")
    kind, medium = local.filesystem(root), local.medium(root)
    if medium == "network":
        return "multithread", f"the files lie on a network filesystem ({kind}), where a map fetches page by page"
    if medium == "object":
        return "multithread", f"the files lie in a mounted object store ({kind}), which wants many requests at once"
    if medium == "memory":
        return "lazy", f"the files lie in memory ({kind})"
    entries = [source.entry(file) for file in files]
    with io_errors("looking at", root):
        share = cached_share(source, entries)
    if share is None:
        return "lazy", "the files are local"
    if share >= MOSTLY:
        return "lazy", f"{share:.0%} of the files are in the page cache, which a map uses in place"
    cold = f"{share:.0%} of the files are in the page cache"
    if by_ranges:
        return "multithread", f"{cold}; threads fetch them ahead"
    if sum(entry.size for entry in entries) < WORTH_MEASURING:
        return "read", f"{cold}; large reads are steadier on a cold disk"
    rates = measured(root, files)
    said = ", ".join(f"{way} {rate:.2g}" for way, rate in rates.items())
    return max(rates, key=rates.__getitem__), f"{cold}; measured here, GB/s: {said}"


def _all_safetensors(files: Sequence[str]) -> bool:
    return all(file.endswith(".safetensors") for file in files)


def _has_fastsafetensors() -> bool:
    return importlib.util.find_spec("fastsafetensors") is not None


# --- rates


def measured(root: Path, files: Sequence[str]) -> dict[str, float]:
    """Measure the GB/s of each way of reading the largest file, once for its disk."""
    path = max((root / file for file in files), key=lambda p: p.stat().st_size)
    disk = path.stat().st_dev
    if disk not in _RATES:
        size = path.stat().st_size
        ways: dict[str, Callable[[Path, int], float]] = {"read": _by_reads(1), "lazy": _by_map}
        threads = backend("cpu").workers("multithread", local.medium(root))
        if threads > 1:
            ways["multithread"] = _by_reads(threads)
        # Each way reads another part of the file, so that none finds what the one before it left in the cache.
        places = [size * index // len(ways) // CHUNK * CHUNK for index in range(len(ways))]
        with io_errors("measuring", path):
            _RATES[disk] = {name: way(path, at) for (name, way), at in zip(ways.items(), places, strict=True)}
    return _RATES[disk]


def _by_reads(threads: int) -> Callable[[Path, int], float]:
    """Return a measurement of reads by some threads: GB/s of a file from a byte on."""

    def way(path: Path, begin: int) -> float:
        lock, chunks, done = threading.Lock(), iter(range(begin, begin + PROBE_BYTES, CHUNK)), []
        began = time.perf_counter()

        def work() -> None:
            memory = np.empty(CHUNK, np.uint8)
            with path.open("rb", buffering=0) as file:
                while time.perf_counter() - began < PROBE_S:
                    with lock:
                        at = next(chunks, None)
                    if at is None:
                        return
                    done.append(os.preadv(file.fileno(), [memory.data], at))

        running = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return sum(done) / (time.perf_counter() - began) / 1e9

    return way


def _by_map(path: Path, begin: int) -> float:
    """Measure the GB/s of a map of a file from a byte on, by touching every page."""
    began, done = time.perf_counter(), 0
    while done < PROBE_BYTES and time.perf_counter() - began < PROBE_S:
        # A map for each part: mapped pages count as the process's memory, where a measurement should not show.
        part = map_file(path)[begin + done : begin + done + CHUNK]
        # One byte of a page is enough for the kernel to load all of it.
        part[:: mmap.PAGESIZE].max(initial=0)
        done += len(part)
        if not len(part):
            break
    return done / (time.perf_counter() - began) / 1e9


# --- the loader


class AutoLoader(WeightLoader):
    """The strategy `auto`, which chooses for each checkpoint; `chosen` and `why` say what, after the first tensor."""

    name = "auto"
    is_local = False

    def __init__(self) -> None:
        self.chosen = ""
        self.why = ""

    def _pick(self, files: PinnedFiles, specs: Sequence[WeightSpec], device: str | None) -> WeightLoader:
        self.chosen, self.why = choose(files, sorted({spec.file for spec in specs}), device)
        log.info("read by %s: %s", self.chosen, self.why)
        return BY_NAME[self.chosen]()

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        with self._pick(files, specs, None).open(files, specs) as reader:
            yield reader

    def _tensors(self, checkpoint: Checkpoint, specs: Sequence[WeightSpec], device: str | None) -> Any:
        return self._pick(checkpoint.source, specs, device)._tensors(checkpoint, specs, device)
