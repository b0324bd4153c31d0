"""What single strategies promise beside what all do."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec, StorageError
from loaders.storage import local
from loaders.strategies import (
    AutoLoader,
    FastSafetensorsLoader,
    LowMemoryLoader,
    MultiThreadWeightLoader,
    SafetensorsLoader,
    StreamingWeightLoader,
    UnifiedMemoryLoader,
    auto,
    fastsafetensors,
    loader,
)
from loaders.strategies.reading.buffers import Buffers
from loaders.strategies.reading.thread_tuning import LAP_BYTES, Workers
from loaders.strategies.streaming import batched
from tests.making import LLAMA, Raw, write_checkpoint

MB = 1_000_000
ROOT = Path(__file__).resolve().parent.parent.parent


def write(folder: Path, count: int = 6, items: int = 1000, shards: int = 2) -> dict[str, bytes]:
    rng = np.random.default_rng(2)
    made = {f"layers.{i}.up.weight": Raw("BF16", rng.integers(0, 1 << 16, items, np.uint16)) for i in range(count)}
    write_checkpoint(folder, made, config=LLAMA, shards=shards)
    return {name: raw.data.tobytes() for name, raw in made.items()}


# --- streaming


def test_weights_of_priority_come_first_in_the_order_given(tmp_path: Path) -> None:
    wanted = write(tmp_path / "m")
    by = StreamingWeightLoader(priority_weights=["layers.4", "layers.[12].*"])
    found = list(by.iterate_weights(tmp_path / "m"))
    order = [4, 1, 2, 0, 3, 5]
    assert (
        [name for name, _ in found]
        == [f"layers.{i}.up.weight" for i in order]
        == list(by.get_weight_specs(tmp_path / "m"))
    )
    assert {name: value.tobytes() for name, value in found} == wanted


def test_batches_stay_within_their_share_of_the_budget(tmp_path: Path) -> None:
    wanted = write(tmp_path / "m", count=9, items=2 * MB)
    by = StreamingWeightLoader(memory_budget_mb=24, prefetch_count=1)
    batches = list(by.iterate_batches(tmp_path / "m"))
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert {name: value.tobytes() for batch in batches for name, value in batch.items()} == wanted
    assert by.stats.tensors == 9
    assert batched([5, 5, 20, 1], 10) == [[5, 5], [20], [1]]


def test_no_more_than_the_prefetched_batches_are_fetched_before_they_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "m", count=12, items=2 * MB)
    checkpoint = open_checkpoint(tmp_path / "m")
    by = StreamingWeightLoader(memory_budget_mb=16, prefetch_count=1)
    before = int(Path("/proc/self/io").read_text().split()[1])
    weights = by.iterate_weights(checkpoint)
    next(weights)
    time.sleep(0.2)
    fetched = int(Path("/proc/self/io").read_text().split()[1]) - before
    weights.close()
    assert 4 * MB <= fetched <= 16 * MB + 300_000


def test_a_tensor_larger_than_the_budget_is_mapped_whole_or_comes_in_slices(tmp_path: Path) -> None:
    wanted = write(tmp_path / "m", count=3, items=12 * MB)
    by = StreamingWeightLoader(memory_budget_mb=16)
    for name, value in by.iterate_weights(tmp_path / "m"):
        assert value.tobytes() == wanted[name]
    by = StreamingWeightLoader(memory_budget_mb=16)
    found: dict[str, bytes] = {}
    for part in by.iterate_slices(tmp_path / "m"):
        assert part.data.nbytes <= 4 * MB
        found[part.spec.name] = found.get(part.spec.name, b"") + part.data.tobytes()
    assert found == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_budget_mb": 1}, "memory_budget_mb: expected at least 16, found 1"),
        ({"prefetch_count": -1}, "prefetch_count: expected 0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSpec, match=message):
        StreamingWeightLoader(**settings)


LIMITED = """
import json, resource, sys
limit, path, strategy, settings = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
from loaders.strategies import loader
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
made, ends, total = loader(strategy, **settings), 0, 0
try:
    if sys.argv[5] == "slices":
        for part in made.iterate_slices(path):
            total += part.data.nbytes
            ends += int(part.data[0])
    else:
        for name, value in made.iterate_weights(path):
            total += value.nbytes
            ends += int(value.reshape(-1)[0])
except MemoryError:
    print(json.dumps({"out_of_memory": True}))
else:
    print(json.dumps({"bytes": total, "ends": ends, "peak": made.stats.peak_anonymous_bytes}))
"""


def sparse(folder: Path, tensors: int, size: int) -> None:
    """bfloat16 tensors of `size` bytes each, in one file that is mostly holes; the first weight of each is 1, 2, ..."""
    folder.mkdir()
    header = {
        f"layers.{i}.up.weight": {
            "dtype": "BF16", "shape": [size // 2048, 1024], "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(tensors)
    }  # fmt: skip
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % 8)
    (folder / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for i in range(tensors):
            file.seek(8 + len(raw) + i * size)
            file.write((i + 1).to_bytes(2, "little"))
        file.truncate(8 + len(raw) + tensors * size)


def limited(limit: int, path: Path, strategy: str, settings: dict[str, Any], how: str) -> Any:
    arguments = [str(limit), str(path), strategy, json.dumps(settings), how]
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts anonymous maps on Linux only")
def test_6_gb_stream_under_a_limit_of_512_mb_that_full_loading_exceeds(tmp_path: Path) -> None:
    """RLIMIT_DATA: the heap and all private memory that can be written to."""
    limit, budget = 512 * MB, {"memory_budget_mb": 256.0}
    size = 96 << 20
    sparse(tmp_path / "m", 60, size)
    try:
        found = limited(limit, tmp_path / "m", "streaming", budget, "weights")
        assert (found["bytes"], found["ends"]) == (60 * size, 61 * 30)
        assert found["bytes"] > 6e9
        assert found["peak"] < 280 * MB
        assert limited(limit, tmp_path / "m", "eager", {}, "weights") == {"out_of_memory": True}
    finally:
        (tmp_path / "m" / "model.safetensors").unlink()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts anonymous maps on Linux only")
def test_a_tensor_of_2_gb_streams_in_slices_under_the_same_limit(tmp_path: Path) -> None:
    sparse(tmp_path / "m", 1, 2 << 30)
    try:
        found = limited(512 * MB, tmp_path / "m", "streaming", {"memory_budget_mb": 128.0}, "slices")
        assert found["bytes"] == 2 << 30
        assert found["peak"] < 160 * MB
    finally:
        (tmp_path / "m" / "model.safetensors").unlink()


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
    with pytest.raises(BadSpec, match="must be above zero"):
        MultiThreadWeightLoader(max_workers=0)


def test_ranges_read_from_several_threads_are_fetched_ahead_into_the_page_cache(tmp_path: Path) -> None:
    wanted = write(tmp_path / "m", count=6, items=2 * MB)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name in ("multithread", "streaming"):
        before = int(Path("/proc/self/io").read_text().split()[1])
        with loader(name).open(checkpoint.root, checkpoint.weights) as reader:
            first = checkpoint.weights[0]
            assert reader.read(first, 0, 1000).tobytes() == wanted[first.name][:1000]
            time.sleep(0.3)
            assert int(Path("/proc/self/io").read_text().split()[1]) - before > 8 * MB
            for spec in checkpoint.weights:
                assert reader.read(spec, 5, spec.size).tobytes() == wanted[spec.name][5:]


# --- fastsafetensors, runai


def test_a_library_that_is_not_installed_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "fastsafetensors", None)
    monkeypatch.setitem(sys.modules, "runai_model_streamer.file_streamer", None)
    with pytest.raises(BadSpec, match=r"not installed .*: pip install 'weightmill\[fastsafetensors\]'"):
        loader("fastsafetensors").load_weights(tmp_path / "m")
    with pytest.raises(BadSpec, match=r"not installed .*: pip install 'weightmill\[runai\]'"):
        loader("runai").load_weights(tmp_path / "m")


@pytest.mark.engine
def test_other_containers_are_refused_by_fastsafetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadSpec, match="it reads safetensors, found pytorch_model.bin; strategy=multithread reads it"):
        loader("fastsafetensors").load_weights(tmp_path)


class Gds:
    """A machine with GPU direct storage, as far as the loader sees it; tensors lie in the CPU's memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.calls: list[bool] = []
        made = fastsafetensors.Buffer

        def buffer(path: Path, names: list[str], device: str, gds: bool) -> fastsafetensors.Buffer:
            self.calls.append(gds)
            if gds and error is not None:
                raise error
            return made(path, names, "cpu", False)

        monkeypatch.setattr(fastsafetensors, "Buffer", buffer)
        monkeypatch.setattr(fastsafetensors, "gds_available", lambda index=0: True)
        monkeypatch.setattr(fastsafetensors, "torch_device", lambda device: (None, None))


def bytes_on(by: FastSafetensorsLoader, folder: Path, device: str) -> dict[str, bytes]:
    checkpoint = open_checkpoint(folder)
    found = {}
    for file in sorted({spec.file for spec in checkpoint.weights}):
        mine = [spec for spec in checkpoint.weights if spec.file == file]
        for spec, tensor in zip(mine, by.file(folder, mine, device), strict=True):
            found[spec.name] = fastsafetensors._bytes_of(tensor).tobytes()
    return found


@pytest.mark.engine
def test_direct_storage_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastsafetensors")
    wanted, gds = write(tmp_path / "m"), Gds(monkeypatch)
    by = FastSafetensorsLoader()
    assert bytes_on(by, tmp_path / "m", "cuda:0") == wanted
    assert (gds.calls, by.said) == ([True, True], "with GPU direct storage")
    by = FastSafetensorsLoader(gds=False)
    assert bytes_on(by, tmp_path / "m", "cuda:0") == wanted
    assert by.said == "without GPU direct storage: as asked"


@pytest.mark.engine
def test_direct_storage_that_fails_is_done_without_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("fastsafetensors")
    wanted = write(tmp_path / "m")
    Gds(monkeypatch, RuntimeError("cuFileDriverOpen failed: 5001"))
    with caplog.at_level(logging.INFO, "weightmill"):
        assert bytes_on(FastSafetensorsLoader(), tmp_path / "m", "cuda") == wanted
    [said] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "without GPU direct storage: GPU direct storage failed (cuFileDriverOpen failed: 5001)" in said.message
    with pytest.raises(StorageError, match=r"strategy.gds: GPU direct storage failed on .*cuFileDriverOpen"):
        bytes_on(FastSafetensorsLoader(gds=True), tmp_path / "m", "cuda")


@pytest.mark.engine
def test_missing_direct_storage_is_said_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("fastsafetensors")
    wanted = write(tmp_path / "m")
    Gds(monkeypatch)
    monkeypatch.setattr(fastsafetensors, "gds_available", lambda index=0: False)
    with caplog.at_level(logging.INFO, "weightmill"):
        assert bytes_on(FastSafetensorsLoader(), tmp_path / "m", "cuda") == wanted
    assert "without GPU direct storage: this machine has none" in caplog.text
    with pytest.raises(BadSpec, match="this machine has no GPU direct storage"):
        bytes_on(FastSafetensorsLoader(gds=True), tmp_path / "m", "cuda")
    with pytest.raises(BadSpec, match="loads to a GPU, not to device=cpu"):
        bytes_on(FastSafetensorsLoader(gds=True), tmp_path / "m", "cpu")


@pytest.mark.skipif(Path("/dev/nvidia-fs0").exists(), reason="this machine has GPU direct storage")
def test_direct_storage_is_not_found_where_there_is_none() -> None:
    assert not fastsafetensors.gds_available()


@pytest.mark.engine
def test_what_fastsafetensors_gave_outlives_its_buffers(tmp_path: Path) -> None:
    library = pytest.importorskip("fastsafetensors")
    wanted = write(tmp_path / "m", items=100_000)
    found = loader("fastsafetensors").load_weights(tmp_path / "m", device="cpu")
    gc.collect()
    assert library.live_allocation_count() == 0
    assert {n: fastsafetensors._bytes_of(t).tobytes() for n, t in found.items()} == wanted


# --- low_memory, unified_memory, lazy and eager


@pytest.mark.engine
def test_only_rank_0_holds_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    wanted = write(tmp_path / "m")
    first = LowMemoryLoader(rank=0).load_weights(tmp_path / "m")
    assert {n: fastsafetensors._bytes_of(t).tobytes() for n, t in first.items()} == wanted
    monkeypatch.setenv("RANK", "3")
    by = LowMemoryLoader()
    other = by.load_weights(tmp_path / "m")
    assert list(other) == list(first)
    for name, tensor in other.items():
        assert tensor.device.type == "meta"
        assert (tensor.shape, tensor.dtype) == (first[name].shape, torch.bfloat16)
    assert (by.stats.tensors, by.stats.bytes) == (6, 0)
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(BadSpec, match="rank 3 holds no weights"), by.open(checkpoint.root, checkpoint.weights):
        pass
    with pytest.raises(BadSpec, match="not to device=mps"):
        by.load_weights(tmp_path / "m", device="mps")


def test_unified_memory_refuses_a_device_with_memory_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "m")
    with pytest.raises(BadSpec, match="device=cuda:1 has memory of its own"):
        UnifiedMemoryLoader().load_weights(tmp_path / "m", device="cuda:1")


@pytest.mark.engine
@pytest.mark.parametrize("name", ["unified_memory", "streaming", "multithread"])
def test_mlx_arrays_hold_the_stored_weights(name: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    values = np.linspace(-3, 3, 96, dtype=np.float32).reshape(8, 12)
    write_checkpoint(
        tmp_path / "m",
        {
            "a": Raw("BF16", (values.view(np.uint32) >> 16).astype(np.uint16)),
            "b": Raw("F32", values),
            "c": Raw("F64", values.astype(np.float64)),
            "d": Raw("BOOL", (values > 0).astype(np.uint8)),
            "e": Raw("F16", values.astype(np.float16)),
        },
        config=LLAMA,
    )
    found = loader(name).load_weights(tmp_path / "m", device="mlx")
    kinds = [mx.bfloat16, mx.float32, mx.float32, mx.bool_, mx.float16]
    assert [array.dtype for array in found.values()] == kinds
    assert found["a"].shape == (8, 12)
    cut = ((values.view(np.uint32) >> 16) << 16).view(np.float32)
    assert np.array_equal(np.array(found["a"].astype(mx.float32)), cut)
    for name in "bc":
        assert np.array_equal(np.array(found[name]), values)
    assert np.array_equal(np.array(found["d"]), values > 0)


@pytest.mark.parametrize("lazy", [True, False])
def test_safetensors_are_mapped_or_read(lazy: bool, tmp_path: Path) -> None:
    wanted = write(tmp_path / "m")
    by = SafetensorsLoader(lazy=lazy)
    assert by.name == ("lazy" if lazy else "eager")
    found = by.load_weights(tmp_path / "m")
    assert {n: v.tobytes() for n, v in found.items()} == wanted
    assert all(v.flags.writeable is not lazy for v in found.values())


def test_full_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m")
    monkeypatch.setattr("loaders.strategies.full.free_memory", lambda: 1000)
    with pytest.raises(BadSpec, match="strategy=full: .* of memory are free; strategy=streaming"):
        loader("full").load_weights(tmp_path / "m")


# --- auto


@pytest.mark.parametrize(
    ("kind", "wanted", "why"),
    [
        ("nfs4", "multithread", r"network filesystem \(nfs4\)"),
        ("lustre", "multithread", "page by page"),
        ("fuse.s3fs", "multithread", r"mounted object store \(fuse.s3fs\)"),
        ("tmpfs", "lazy", r"in memory \(tmpfs\)"),
        ("ext4", "lazy", "100% of the files are in the page cache"),
    ],
)
def test_auto_goes_by_where_the_files_lie(
    kind: str, wanted: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_by_name = write(tmp_path / "m")
    monkeypatch.setattr(local, "filesystem", lambda path: kind)
    monkeypatch.setattr(local, "cached_share", lambda path: 1.0)
    by = AutoLoader()
    found = by.load_weights(tmp_path / "m")
    assert {n: v.tobytes() for n, v in found.items()} == bytes_by_name
    assert by.chosen == wanted
    assert re.search(why, by.why), by.why


def test_auto_measures_a_cold_disk_and_says_the_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m", items=200_000)
    files = [tag.name for tag in open_checkpoint(tmp_path / "m").files]
    monkeypatch.setattr(local, "filesystem", lambda path: "ext4")
    monkeypatch.setattr(local, "cached_share", lambda path: 0.0)
    assert auto.choose(tmp_path / "m", files)[0] == "read"  # too small to matter
    monkeypatch.setattr(auto, "WORTH_MEASURING", 1000)
    monkeypatch.setattr(auto, "_RATES", {})
    chosen, why = auto.choose(tmp_path / "m", files)
    [rates] = auto._RATES.values()
    assert chosen == max(rates, key=rates.__getitem__)
    assert set(rates) >= {"read", "lazy"}
    assert "0% of the files are in the page cache; measured here, GB/s: read " in why


def test_auto_takes_direct_storage_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastsafetensors")
    write(tmp_path / "m")
    monkeypatch.setattr(auto, "gds_available", lambda index=0: index == 1)
    files = ["model-00001-of-00002.safetensors"]
    assert auto.choose(tmp_path / "m", files, "cuda:1")[0] == "fastsafetensors"
    assert auto.choose(tmp_path / "m", files, "cuda:0")[0] != "fastsafetensors"
    assert auto.choose(tmp_path / "m", files)[0] != "fastsafetensors"


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize("name", ["lazy", "read", "multithread", "streaming", "fastsafetensors", "full", "auto"])
def test_weights_on_a_gpu_are_the_stored_ones(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    wanted = write(tmp_path / "m", items=100_000)
    found = loader(name).load_weights(tmp_path / "m", device="cuda")
    assert {t.device.type for t in found.values()} == {"cuda"}
    assert {n: fastsafetensors._bytes_of(t.cpu()).tobytes() for n, t in found.items()} == wanted


def test_files_of_another_machines_disk_are_told_by_the_filesystem(tmp_path: Path) -> None:
    assert local.medium(tmp_path) in ("local", "rotational", "memory")
    assert local.medium(Path("/proc")) in ("local", "rotational")
    if os.path.ismount("/dev/shm"):
        assert local.medium(Path("/dev/shm")) == "memory"
