"""Streaming: the order, the batches, and gigabytes under a limit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec
from loaders.places import ROOT
from loaders.strategies import StreamingWeightLoader
from loaders.strategies.streaming import batched
from tests.loaders.strategies.writing import MB, drop, write

# --- streaming


@pytest.mark.quick
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
    drop(tmp_path / "m")  # what is cached is not fetched
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
def test_gigabytes_stream_under_a_limit_of_512_mb_that_full_loading_exceeds(tmp_path: Path) -> None:
    """RLIMIT_DATA: the heap and all private memory that can be written to."""
    limit, budget = 512 * MB, {"memory_budget_mb": 256.0}
    size = 96 << 20
    sparse(tmp_path / "m", 24, size)
    try:
        found = limited(limit, tmp_path / "m", "streaming", budget, "weights")
        assert (found["bytes"], found["ends"]) == (24 * size, 25 * 12)
        assert found["bytes"] > 2.4e9
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
