"""What single strategies promise beside what all do: lazy, full, low_memory, unified_memory, runai."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec, StorageError
from loaders.strategies import (
    FastSafetensorsLoader,
    LowMemoryLoader,
    MultiThreadWeightLoader,
    SafetensorsLoader,
    StreamingWeightLoader,
    UnifiedMemoryLoader,
    fastsafetensors,
    loader,
)
from tests.loaders.strategies.writing import write
from tests.making import LLAMA, Raw, write_checkpoint

# --- fastsafetensors, runai


def test_a_library_that_is_not_installed_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "fastsafetensors", None)
    monkeypatch.setitem(sys.modules, "runai_model_streamer.file_streamer", None)
    with pytest.raises(BadSpec, match=r"not installed: pip install 'weightmill\[fastsafetensors\]'"):
        loader("fastsafetensors").load_weights(tmp_path / "m")
    with pytest.raises(BadSpec, match=r"not installed: pip install 'weightmill\[runai\]'"):
        loader("runai").load_weights(tmp_path / "m")


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
    with pytest.raises(BadSpec, match="rank 3 holds no weights"), by.open(checkpoint.source, checkpoint.weights):
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
    by = SafetensorsLoader("lazy" if lazy else "eager")
    assert by.name == SafetensorsLoader(lazy=lazy).name == ("lazy" if lazy else "eager")
    found = by.load_weights(tmp_path / "m")
    assert {n: v.tobytes() for n, v in found.items()} == wanted
    assert all(v.flags.writeable is not lazy for v in found.values())


@pytest.mark.quick
def test_loaders_are_made_by_position_as_other_libraries_make_them() -> None:
    with pytest.raises(BadSpec, match="expected lazy or eager, found 'torchao'"):
        SafetensorsLoader("torchao")
    by = MultiThreadWeightLoader(4, False, 100 * 1024 * 1024)
    assert (by.max_workers, by.adaptive_workers, by.min_file_size_per_worker) == (4, False, 104.8576)
    assert by.stats.throughput_gbps() == by.stats.throughput_gbps == 0.0
    assert MultiThreadWeightLoader(min_file_size_per_worker=8).min_file_size_per_worker == 8
    ordered = StreamingWeightLoader(64.0, 1, ["lm_head", "embed"])
    assert (ordered.priority_weights, ordered.prefetch_count) == (("lm_head", "embed"), 1)
    assert StreamingWeightLoader(64, 0, None).priority_weights == ()
    assert StreamingWeightLoader(priority_weights="lm_head").priority_weights == ("lm_head",)
    assert [FastSafetensorsLoader(use).gds for use in (True, False)] == [None, False]
    assert FastSafetensorsLoader(gds=True).gds is True
    with pytest.raises(BadSpec, match="use_gds=False forbids it"):
        FastSafetensorsLoader(False, gds=True)


def test_full_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m")
    monkeypatch.setattr("loaders.strategies.full.free_memory", lambda: 1000)
    with pytest.raises(BadSpec, match="strategy=full: .* of memory are free; strategy=streaming"):
        loader("full").load_weights(tmp_path / "m")


@pytest.mark.engine
def test_weights_go_through_staging_buffers_piece_by_piece(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from loaders.backends.staging import BUFFERS, Filling, Staging

    values, longest = np.random.default_rng(1).integers(0, 256, 10_001, np.uint8), list[int]()

    def fill(at: int, out: np.ndarray) -> None:
        longest.append(out.size)
        np.copyto(out, values[at : at + out.size])

    sizes = (0, 1, 1000, 1000 * BUFFERS, 10_001)
    with Staging("cpu", 2, part=1000) as staging:
        found = list(staging.copied(Filling(size, fill) for size in sizes))
    assert [tensor.numpy().tobytes() for tensor in found] == [values[:size].tobytes() for size in sizes]
    assert max(longest) == 1000
    wanted = write(tmp_path / "m")
    loaded = loader("pinned").load_weights(tmp_path / "m", device="cpu")
    assert {n: fastsafetensors._bytes_of(t).tobytes() for n, t in loaded.items()} == wanted
    with pytest.raises(BadSpec, match="device=mlx has no pinned memory"):
        loader("pinned").load_weights(tmp_path / "m", device="mlx")


@pytest.mark.engine
def test_tensors_are_staged_ahead_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from loaders.backends import staging

    monkeypatch.setattr(staging, "AHEAD", 250)
    asked = list[int]()

    def fillings() -> Iterator[staging.Filling]:
        for number in range(6):
            asked.append(number)
            yield staging.Filling(100, lambda at, out: out.fill(1))

    with staging.Staging("cpu", 2) as stage:
        tensors = stage.copied(fillings())
        for number in range(6):
            next(tensors)
            assert len(asked) == min(6, 3 + number)


@pytest.mark.engine
def test_what_cannot_be_read_is_said_in_its_turn() -> None:
    pytest.importorskip("torch")
    from loaders.backends.staging import Filling, Staging

    def fail(at: int, out: np.ndarray) -> None:
        raise StorageError("reading m/a: it is gone")

    with Staging("cpu", 2) as staging:
        tensors = staging.copied([Filling(10, lambda at, out: out.fill(1)), Filling(10, fail)])
        assert next(tensors).sum() == 10
        with pytest.raises(StorageError, match="it is gone"):
            next(tensors)


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize(
    "name", ["lazy", "pinned", "read", "multithread", "streaming", "fastsafetensors", "full", "auto"]
)
def test_weights_on_a_gpu_are_the_stored_ones(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    wanted = write(tmp_path / "m", items=100_000)
    found = loader(name).load_weights(tmp_path / "m", device="cuda")
    assert {t.device.type for t in found.values()} == {"cuda"}
    assert {n: fastsafetensors._bytes_of(t.cpu()).tobytes() for n, t in found.items()} == wanted


def test_loaders_are_shown_with_their_settings() -> None:
    assert repr(SafetensorsLoader("eager")) == "SafetensorsLoader(strategy='eager')"
    assert repr(loader("lazy")) == "LazyLoader()"
    shown = repr(StreamingWeightLoader(memory_budget_mb=64))
    assert shown == "StreamingWeightLoader(memory_budget_mb=64, prefetch_count=2, priority_weights=())"
    assert repr(MultiThreadWeightLoader(3)).startswith("MultiThreadWeightLoader(max_workers=3, ")


def test_a_text_is_no_list_of_names(tmp_path: Path) -> None:
    write(tmp_path / "m")
    for call in (
        loader("lazy").load_weights,
        lambda path, names: next(loader("lazy").iterate_weights(path, names=names)),
    ):
        with pytest.raises(BadSpec, match=r"names: expected a list of names, found the text 'a.b'; give \['a.b'\]"):
            call(tmp_path / "m", names="a.b")  # type: ignore[operator]
