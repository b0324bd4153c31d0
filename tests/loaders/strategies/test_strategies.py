"""What every strategy must satisfy, on every container: the same bytes in the same order, the same errors, each byte
fetched once, memory within its bound.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.containers import CONTAINERS, gguf, writer_of
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec, StorageError
from loaders.specs import StoredSpec, StoredTensor
from loaders.strategies import LOADERS, StreamingWeightLoader, WeightLoader, loader
from tests.making import LLAMA, Raw, write_checkpoint

MB = 1_000_000
NEEDS = {"fastsafetensors": "fastsafetensors", "runai": "runai_model_streamer"}
GGUF_ONLY = ("Q8_0",)
SAFETENSORS_ONLY = ("fastsafetensors",)  # strategies that read one container
DTYPES_HERE = {"BF16": np.uint16, "F32": np.float32, "U8": np.uint8, "I64": np.int64, "Q8_0": np.uint8}


def tensors(kinds: tuple[str, ...]) -> dict[str, Raw]:
    """Small tensors of several dtypes; an odd number of bytes among them, an empty one, a scalar."""
    rng = np.random.default_rng(0)
    shapes = {
        "layers.0.up.weight": ("BF16", (48, 32)),
        "layers.0.norm.weight": ("F32", (7,)),
        "layers.0.odd": ("U8", (13,)),
        "layers.1.up.weight": ("BF16", (96, 64)),
        "layers.1.ids": ("I64", (5,)),
        "layers.1.scale": ("F32", ()),
        "layers.1.none": ("BF16", (0, 4)),
        "layers.2.q8.weight": ("Q8_0", (8, 64)),
        "layers.2.up.weight": ("F32", (33, 64)),
    }
    made = {}
    for name, (kind, shape) in shapes.items():
        if kind in kinds:
            storage = np.dtype(DTYPES_HERE[kind])
            count = DTYPES[kind].size(shape) // storage.itemsize
            raw = rng.integers(0, 256, count * storage.itemsize, np.uint8).view(storage)
            made[name] = Raw(kind, raw if kind == "Q8_0" else raw.reshape(shape))
    return made


def write_safetensors(folder: Path) -> dict[str, Raw]:
    made = tensors(("BF16", "F32", "U8", "I64"))
    write_checkpoint(folder, made, config=LLAMA, shards=3)
    return {name: made[name] for name in sorted(made)}


def write_pytorch(folder: Path) -> dict[str, Raw]:
    torch = pytest.importorskip("torch")
    folder.mkdir()
    made = tensors(("BF16", "F32", "U8", "I64"))
    names = sorted(made)
    for shard, mine in enumerate((names[:3], names[3:]), 1):
        state = {}
        for name in mine:
            tensor = torch.from_numpy(made[name].data.copy())
            state[name] = tensor.view(torch.bfloat16) if made[name].dtype == "BF16" and tensor.numel() else tensor
            if made[name].dtype == "BF16" and not tensor.numel():
                state[name] = torch.empty(made[name].data.shape, dtype=torch.bfloat16)
        torch.save(state, folder / f"pytorch_model-{shard:05d}-of-00002.bin")
    return {name: made[name] for name in names}


def write_gguf(folder: Path) -> dict[str, Raw]:
    folder.mkdir()
    made = {n: r for n, r in tensors(("BF16", "F32", "Q8_0")).items() if r.data.size and r.data.shape}
    specs = {"layers.2.q8.weight": (8, 64)}
    stored = [StoredTensor(n, StoredSpec(DTYPES[r.dtype], specs.get(n, r.data.shape))) for n, r in made.items()]
    head = {"general.architecture": gguf.text("none"), "general.name": gguf.text("m")}
    laid = gguf.with_head(gguf.lay_out("model.gguf", stored), head)
    writer = writer_of(folder / "model.gguf", laid)
    for slot in laid.slots:
        writer.write(slot, 0, made[slot.name].data.reshape(-1).view(np.uint8).data)
    writer.seal()
    writer.close()
    return made


def write_packed(folder: Path) -> dict[str, Raw]:
    folder.mkdir()
    made = {n: r for n, r in tensors(("BF16", "F32")).items() if r.data.size and r.data.shape}
    manifest, data = {}, b""
    for name in sorted(made):
        raw = made[name]
        data += bytes(-len(data) % 64)
        entry = {"offset": len(data), "size": raw.data.nbytes, "shape": list(raw.data.shape), "dtype": raw.dtype}
        manifest[name], data = entry, data + raw.data.tobytes()
    (folder / "model_weights.json").write_text(json.dumps({"tensors": manifest}))
    (folder / "model_weights.bin").write_bytes(data)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return made


WRITE: dict[str, Callable[[Path], dict[str, Raw]]] = {
    "safetensors": write_safetensors,
    "pytorch": write_pytorch,
    "gguf": write_gguf,
    "packed": write_packed,
}


def made(container: str, folder: Path) -> dict[str, Raw]:
    """A small checkpoint of the container; a new one needs a writer above."""
    return WRITE[container](folder)


def a_loader(name: str, **settings: Any) -> WeightLoader:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name == "low_memory":
        pytest.importorskip("torch")
    return loader(name, **settings)


def raw_bytes(value: Any) -> bytes:
    """Of a numpy array or a torch tensor."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    import torch

    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def pairs() -> Iterator[Any]:
    for container in CONTAINERS:
        for name in LOADERS:
            if container == "safetensors" or name not in SAFETENSORS_ONLY:
                yield pytest.param(name, container, id=f"{name}, {container}")


EVERY = pytest.mark.parametrize(("name", "container"), list(pairs()))


@pytest.mark.engine
@EVERY
def test_whole_tensors_are_the_stored_bytes_in_the_stored_order(name: str, container: str, tmp_path: Path) -> None:
    wanted = made(container, tmp_path / "m")
    specs = a_loader(name).get_weight_specs(tmp_path / "m")
    assert set(specs) == set(wanted)
    for device in (None, "cpu"):
        made_by = a_loader(name)
        found = list(made_by.iterate_weights(tmp_path / "m", device=device))
        assert [n for n, _ in found] == list(specs)
        for key, value in found:  # all are still held: none was overwritten by a later one
            assert raw_bytes(value) == wanted[key].data.tobytes(), key
        assert (made_by.stats.tensors, made_by.stats.bytes) == (len(specs), sum(s.size for s in specs.values()))
        if device == "cpu":
            import torch

            by_name = dict(found)
            assert by_name["layers.1.up.weight"].dtype == torch.bfloat16
            assert tuple(by_name["layers.1.up.weight"].shape) == (96, 64)
            by_name["layers.1.up.weight"].zero_()  # the caller's own: the file does not change
    assert raw_bytes(a_loader(name).load_weights(tmp_path / "m")["layers.1.up.weight"]) == bytes(
        wanted["layers.1.up.weight"].data.tobytes()
    )


@EVERY
def test_slices_are_the_stored_bytes_and_never_larger_than_asked(name: str, container: str, tmp_path: Path) -> None:
    wanted = made(container, tmp_path / "m")
    found: dict[str, list[bytes]] = {}
    for part in a_loader(name).iterate_slices(tmp_path / "m", slice_bytes=1000):
        assert part.data.nbytes <= 1000
        before = b"".join(found.setdefault(part.spec.name, []))
        assert part.start * part.data.itemsize == len(before)
        found[part.spec.name].append(part.data.tobytes())
    assert {n: b"".join(parts) for n, parts in found.items()} == {
        n: raw.data.tobytes() for n, raw in wanted.items() if raw.data.size
    }


@EVERY
def test_ranges_come_in_any_order(name: str, container: str, tmp_path: Path) -> None:
    wanted = made(container, tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    with a_loader(name).open(checkpoint.source, checkpoint.weights) as reader:
        for spec in reversed(checkpoint.weights):
            raw = wanted[spec.name].data.tobytes()
            for start, stop in ((spec.size // 2, spec.size), (0, spec.size // 2)):
                assert reader.read(spec, start, stop).tobytes() == raw[start:stop]


@EVERY
def test_only_the_named_tensors_come(name: str, container: str, tmp_path: Path) -> None:
    made(container, tmp_path / "m")
    names = ["layers.2.up.weight", "layers.0.up.weight"]
    assert sorted(a_loader(name).load_weights(tmp_path / "m", names=names)) == sorted(names)
    with pytest.raises(BadSpec, match="names: 1 tensor that .* does not have, 'layers.9'"):
        list(a_loader(name).iterate_weights(tmp_path / "m", names=["layers.9"]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3000)


def rewrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


FAULTS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "truncated": (cut, BadCheckpoint, "changed while it was read"),
    "vanished": (Path.unlink, StorageError, "it is not there"),
    "changed": (rewrite, BadCheckpoint, "changed while it was read"),
}


@pytest.mark.parametrize("fault", FAULTS)
@EVERY
def test_files_that_change_after_their_headers_were_read_are_refused(
    name: str, container: str, fault: str, tmp_path: Path
) -> None:
    made(container, tmp_path / "m")
    damage, error, message = FAULTS[fault]
    for iterate in ("iterate_weights", "iterate_slices"):
        checkpoint = open_checkpoint(tmp_path / "m")
        file = checkpoint.address.path / checkpoint.weights[-1].file
        kept = file.read_bytes()
        damage(file)
        with pytest.raises(error, match=message):
            list(getattr(a_loader(name), iterate)(checkpoint))
        file.write_bytes(kept)


@EVERY
def test_a_truncated_file_is_refused_before_a_weight_is_read(name: str, container: str, tmp_path: Path) -> None:
    made(container, tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    cut(checkpoint.address.path / checkpoint.weights[-1].file)
    with pytest.raises(BadCheckpoint):
        a_loader(name).get_weight_specs(tmp_path / "m")


# --- each byte once, and memory


def read_bytes() -> int:
    """What this process has asked of read() and its kin."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar:")))


def large(folder: Path, mb: int = 24, count: int = 8) -> int:
    """Several tensors of 3 MB in two shards; bytes in all."""
    rng = np.random.default_rng(1)
    size = mb * MB // count // 2
    write_checkpoint(
        folder,
        {f"layers.{i}.up.weight": Raw("BF16", rng.integers(0, 1 << 16, size, np.uint16)) for i in range(count)},
        config=LLAMA,
        shards=2,
    )
    return size * 2 * count


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts by /proc")
@pytest.mark.parametrize("iterate", ["iterate_weights", "iterate_slices"])
@pytest.mark.parametrize("name", LOADERS)
def test_each_byte_is_fetched_once(name: str, iterate: str, tmp_path: Path) -> None:
    total = large(tmp_path / "m")
    a_loader(name).load_weights(tmp_path / "m")  # libraries are read, too
    checkpoint, made_by = open_checkpoint(tmp_path / "m"), a_loader(name)
    before = read_bytes()
    count = sum(1 for _ in getattr(made_by, iterate)(checkpoint))
    assert count >= 8
    fetched = read_bytes() - before
    assert fetched < 100_000 or total <= fetched < total + 300_000  # mapped, or read; headers and /proc beside it
    assert made_by.stats.bytes == total


BOUNDS = {
    "lazy": 0, "unified_memory": 0, "pinned": 0, "auto": 0, "low_memory": 0, "eager": 48 * MB, "full": 48 * MB,
    "read": 12 * MB, "multithread": 48 * MB, "streaming": 16 * MB, "fastsafetensors": 48 * MB, "runai": 12 * MB,
    "remote": 60 * MB,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "streaming": {"memory_budget_mb": 16.0}, "runai": {"batch_mb": 6.0}, "remote": {"memory_budget_mb": 64.0},
}  # fmt: skip
SLACK = 6 * MB  # threads, the interpreter


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at /proc")
@pytest.mark.parametrize("name", LOADERS)
def test_memory_stays_within_the_stated_bound(name: str, tmp_path: Path) -> None:
    """A tensor of 6 MB at a time; `read` keeps one for the next, `remote` fetches ahead, some hold all, fastsafetensors
    a shard and 17 MB.
    """
    large(tmp_path / "m", mb=48)
    settings = SETTINGS.get(name, {})
    for _ in range(2):  # the first brings libraries and the allocator's own
        made_by = a_loader(name, **settings)
        for _, value in made_by.iterate_weights(tmp_path / "m"):
            assert len(value)
    assert made_by.stats.peak_anonymous_bytes <= BOUNDS[name] + SLACK


# --- what is said


@pytest.mark.quick
def test_stats_add_up_and_say_what_was_loaded(tmp_path: Path) -> None:
    total = large(tmp_path / "m")
    made_by = loader("read")
    one = made_by.load_weights(tmp_path / "m")
    first = made_by.stats
    assert (first.files, first.tensors, first.bytes) == (2, 8, total) == (2, len(one), total)
    assert first.seconds > 0
    assert first.throughput_gbps == pytest.approx(total / first.seconds / 1e9)
    if first.warm_bytes + first.cold_bytes:
        assert first.warm_bytes + first.cold_bytes == total
        assert first.temperature == "warm"  # just written
    made_by.load_weights(tmp_path / "m")
    assert made_by.stats.bytes == 2 * total
    assert "16 tensors of 4 files" in str(made_by.stats)
    assert (first + first).bytes == 2 * first.bytes


def test_a_stopped_iteration_counts_what_came(tmp_path: Path) -> None:
    total = large(tmp_path / "m")
    for name in ("lazy", "read", "multithread", "streaming"):
        made_by = loader(name)
        weights = made_by.iterate_weights(tmp_path / "m")
        next(weights)
        weights.close()
        assert made_by.stats.bytes == total // 8


@pytest.mark.quick
def test_unknown_strategies_and_settings_are_refused() -> None:
    with pytest.raises(BadSpec, match="unknown 'quick'; known: lazy, eager"):
        loader("quick")
    with pytest.raises(BadSpec, match="strategy=lazy: .*memory_budget_mb"):
        loader("lazy", memory_budget_mb=3)
    assert isinstance(loader("streaming", memory_budget_mb=64), StreamingWeightLoader)
