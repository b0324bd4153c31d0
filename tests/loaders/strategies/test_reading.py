"""What strategies share: buffers that are used again, threads by what they bring, reading ahead."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec
from loaders.storage import local
from loaders.strategies import MultiThreadWeightLoader, loader
from loaders.strategies.reading.buffers import Buffers
from loaders.strategies.reading.open_files import OpenFiles
from loaders.strategies.reading.thread_tuning import LAP_BYTES, Workers
from tests.loaders.strategies.writing import MB, drop, write

# --- buffers


def test_a_buffer_is_used_again_only_when_nobody_holds_it() -> None:
    buffers = Buffers(10_000)
    first = buffers.take(1000)
    first[:] = 7
    kept = first[10:20]
    del first
    second = buffers.take(1000)
    assert not np.shares_memory(second, kept)
    assert (kept == 7).all()
    address = kept.ctypes.data - 10
    del kept
    gc.collect()
    assert buffers.take(900).ctypes.data == address


def test_buffers_in_excess_of_what_may_be_kept_are_let_go() -> None:
    buffers = Buffers(2500)
    held = [buffers.take(1000) for _ in range(4)]
    del held
    buffers.take(10, room=1000)
    assert sum(memory.size for memory in buffers._free) <= 1000


# --- multithread


def turn(workers: Workers, rate: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many reads, of which `rate(threads)` GB come a second."""
    clock = [0.0]
    monkeypatch.setattr("loaders.strategies.reading.thread_tuning.time.perf_counter", lambda: clock[0])
    for _ in range(40):
        with workers.reading(LAP_BYTES):
            clock[0] += LAP_BYTES / rate(workers.limit) / 1e9


@pytest.mark.parametrize(
    ("rate", "wanted"),
    [
        (lambda n: min(n, 4) * 0.1, 4),  # a disk that four threads keep busy
        (lambda n: 0.1, 2),  # one that two do
        (lambda n: n * 0.1, 16),
        (lambda n: 0.1 * n if n <= 4 else 0.05, 4),  # one that more make slower
    ],
)
def test_workers_grow_as_long_as_that_is_faster(
    rate: Callable[[int], float], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(2, 16)
    turn(workers, rate, monkeypatch)
    assert workers.limit == wanted
    assert f"{wanted} threads (measured 2: " in str(workers)


def test_workers_that_are_given_are_all_used() -> None:
    workers = Workers(2, 6, adaptive=False)
    busy, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal busy, most
        with workers.reading(1):
            with lock:
                busy += 1
                most = max(most, busy)
            time.sleep(0.05)
            with lock:
                busy -= 1

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 2 < most <= 6


def test_small_files_get_few_workers(tmp_path: Path) -> None:
    write(tmp_path / "m")
    by = MultiThreadWeightLoader(max_workers=8, adaptive_workers=False)
    by.load_weights(tmp_path / "m")
    assert by.workers_said == "1 threads"
    by = MultiThreadWeightLoader(max_workers=3, adaptive_workers=False, min_file_size_per_worker=0.001)
    by.load_weights(tmp_path / "m")
    assert by.workers_said == "3 threads"
    with pytest.raises(BadSpec, match="expected more than 0"):
        MultiThreadWeightLoader(max_workers=0)


def bytes_asked_for() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_ranges_read_from_several_threads_are_fetched_ahead_into_the_page_cache(tmp_path: Path) -> None:
    wanted = write(tmp_path / "m", count=6, items=2 * MB)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name in ("multithread", "streaming"):
        drop(tmp_path / "m")
        before = bytes_asked_for()
        with loader(name).open(checkpoint.source, checkpoint.weights) as reader:
            first = checkpoint.weights[0]
            assert reader.read(first, 0, 1000).tobytes() == wanted[first.name][:1000]
            time.sleep(0.3)
            assert bytes_asked_for() - before > 8 * MB
            for spec in checkpoint.weights:
                assert reader.read(spec, 5, spec.size).tobytes() == wanted[spec.name][5:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what is in the page cache")
def test_all_that_a_job_will_read_is_fetched_from_when_it_begins(tmp_path: Path) -> None:
    wanted = write(tmp_path / "m", count=6, items=2 * MB)
    checkpoint = open_checkpoint(tmp_path / "m")
    drop(tmp_path / "m")
    before = bytes_asked_for()
    by = MultiThreadWeightLoader()
    with by.ahead(checkpoint.source, checkpoint.weights):
        time.sleep(0.3)
        assert bytes_asked_for() - before > 8 * MB
        for spec in checkpoint.weights:  # units of a job, one after another
            with by.open(checkpoint.source, [spec]) as reader:
                assert reader.read(spec, 0, spec.size).tobytes() == wanted[spec.name]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can fetch without reading")
def test_a_range_is_fetched_as_far_as_the_file_goes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(3 * MB))
    local.drop_cached(tmp_path / "f")
    with (tmp_path / "f").open("rb") as file:
        assert local.fetch(file.fileno(), 5, 2 * MB) == 2 * MB
        assert local.cached_part(file.fileno(), 0, 2 * MB) == 1
        assert local.fetch(file.fileno(), 5, 4 * MB) == 3 * MB


@pytest.mark.parametrize("name", ["multithread", "streaming", "full"])
def test_what_the_page_cache_holds_is_given_in_place_and_may_be_written_to(name: str, tmp_path: Path) -> None:
    wanted = write(tmp_path / "m", count=6, items=2 * MB)
    checkpoint = open_checkpoint(tmp_path / "m")
    drop(tmp_path / "m")
    assert {n: v.tobytes() for n, v in loader(name).load_weights(checkpoint).items()} == wanted
    before = bytes_asked_for()
    held = loader(name).load_weights(checkpoint)
    assert bytes_asked_for() - before < MB
    for value in held.values():
        value[:] = 7
    assert {n: v.tobytes() for n, v in loader(name).load_weights(checkpoint).items()} == wanted


def test_ranges_of_a_file_that_was_cut_short_are_not_mapped(tmp_path: Path) -> None:
    write(tmp_path / "m", count=2, items=2 * MB)
    checkpoint = open_checkpoint(tmp_path / "m")
    spec = checkpoint.weights[-1]
    opened = OpenFiles(tmp_path / "m")
    assert opened.in_place(spec, 0, spec.size) is not None
    os.truncate(tmp_path / "m" / spec.file, spec.offset + spec.size - 10)
    assert opened.in_place(spec, 0, spec.size) is None
    opened.close()
