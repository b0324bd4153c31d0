"""Writing PyTorch files: what torch loads, what a zip reader finds, what was planned."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.containers import pytorch_write, writer_of
from loaders.containers.pytorch import read_specs, read_values
from loaders.containers.pytorch_pickle import Ref
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec
from loaders.specs import OutputFile, StoredSpec, StoredTensor
from tests.reading import files_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engine


def stored(name: str, dtype: str, shape: tuple[int, ...], *, is_bound: bool = False) -> StoredTensor:
    return StoredTensor(name, StoredSpec(DTYPES[dtype], shape, is_bound=is_bound))


def write(path: Path, file: OutputFile, lengths: dict[str, int] | None = None) -> dict[str, bytes]:
    rng, contents = np.random.default_rng(0), {}
    writer = writer_of(path / file.name, file)
    for slot in reversed(file.slots):
        size = (lengths or {}).get(slot.name, slot.size)
        contents[slot.name] = rng.integers(0, 2, size, np.uint8).tobytes()
        half = size // 2 if not slot.is_bound else size
        writer.write(slot, 0, memoryview(contents[slot.name][:half]))
        if half < size:
            writer.write(slot, half, memoryview(contents[slot.name][half:]))
    writer.seal()
    writer.close()
    return contents


def bytes_of(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


EVERY = [
    stored(name.lower() if shape else f"scalar {name}", name, shape)
    for name, dtype in DTYPES.items()
    if dtype.bits >= 8 and hasattr(torch, dtype.torch)
    for shape in ((3, 5), ())
] + [stored("empty", "F32", (0, 4)), stored("größe 重み", "F32", (2,))]


def test_every_dtype_comes_back_from_torch_and_from_our_reader(tmp_path: Path) -> None:
    file = pytorch_write.lay_out("m.bin", EVERY)
    contents = write(tmp_path, file)
    assert (tmp_path / "m.bin").stat().st_size == file.size
    for mapped in (False, True):
        found = torch.load(tmp_path / "m.bin", weights_only=True, mmap=mapped)
        assert {name: bytes_of(tensor) for name, tensor in found.items()} == contents
        assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == {
            t.name: (getattr(torch, t.spec.dtype.torch), t.spec.shape) for t in EVERY
        }
    specs = read_specs(files_of(tmp_path), "m.bin")
    raw = (tmp_path / "m.bin").read_bytes()
    assert {s.name: raw[s.offset : s.offset + s.size] for s in specs} == contents
    assert all(spec.offset % 64 == 0 for spec in specs)


def test_any_zip_reader_finds_the_members_that_torch_writes(tmp_path: Path) -> None:
    tensors = [stored("a", "F32", (3,)), stored("b", "BF16", (2, 2))]
    write(tmp_path, pytorch_write.lay_out("name.bin", tensors))
    torch.save({"a": torch.zeros(3), "b": torch.zeros(2, 2).bfloat16()}, tmp_path / "name.pt")
    with zipfile.ZipFile(tmp_path / "name.bin") as ours, zipfile.ZipFile(tmp_path / "name.pt") as theirs:
        assert ours.testzip() is None
        assert [n for n in theirs.namelist() if "serialization_id" not in n] == ours.namelist()
        for name in ("version", "byteorder", ".format_version", ".storage_alignment"):
            assert ours.read(f"name/{name}") == theirs.read(f"name/{name}")


@pytest.mark.parametrize("length", [1, 169, 171, 300])
def test_a_tensor_whose_length_was_open_is_as_long_as_it_became(tmp_path: Path, length: int) -> None:
    tensors = [
        stored("z", "U8", (300,), is_bound=True),
        stored("a", "F32", (7,)),
        stored("y", "U8", (9,), is_bound=True),
    ]
    file = pytorch_write.lay_out("m.bin", tensors)
    contents = write(tmp_path, file, {"z": length, "y": 3})
    found = torch.load(tmp_path / "m.bin", weights_only=True)
    assert {name: bytes_of(tensor) for name, tensor in found.items()} == contents
    assert (tmp_path / "m.bin").stat().st_size <= file.size
    assert zipfile.ZipFile(tmp_path / "m.bin").testzip() is None


def test_modules_hold_values_beside_their_tensors_and_share_them(tmp_path: Path) -> None:
    about = (
        ("one", (("w", Ref("one.w", is_parameter=True)), ("bits", 4), ("far", 1 << 40), ("on", True), ("text", "4bit"),
                 ("shape", (3, 2)), ("dtype", DTYPES["BF16"]))),
        ("two", (("w", Ref("one.w")),)),
    )  # fmt: skip
    write(tmp_path, pytorch_write.lay_out("m.pt", [stored("one.w", "F32", (3, 2))], about))
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    one, two = found["one"], found["two"]
    assert isinstance(one["w"], torch.nn.Parameter)
    assert not one["w"].requires_grad
    assert one["w"].data_ptr() == two["w"].data_ptr()
    del one["w"]
    assert one == {"bits": 4, "far": 1 << 40, "on": True, "text": "4bit", "shape": torch.Size([3, 2]),
                   "dtype": torch.bfloat16}  # fmt: skip
    values = read_values(files_of(tmp_path), "m.pt")
    assert values["one.shape"] == (3, 2)
    assert values["one.dtype"] is DTYPES["BF16"]
    assert {spec.name for spec in read_specs(files_of(tmp_path), "m.pt")} == {"one.w", "two.w"}


def test_zip64_takes_over_at_four_gibibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code at a limit of 4096 bytes: fields are wide where they must be, and readers follow them."""
    monkeypatch.setattr(pytorch_write, "LIMIT", 4096)
    monkeypatch.setattr(pytorch_write, "STANDS_FOR_LIMIT", 0xFFFFFFFF)
    file = pytorch_write.lay_out(
        "m.bin", [stored("a", "U8", (5000,)), stored("b", "U8", (3,)), stored("c", "F32", (3000,))]
    )
    contents = write(tmp_path, file)
    assert (tmp_path / "m.bin").stat().st_size == file.size
    found = torch.load(tmp_path / "m.bin", weights_only=True)
    assert {name: bytes_of(tensor) for name, tensor in found.items()} == contents
    assert zipfile.ZipFile(tmp_path / "m.bin").testzip() is None
    assert {spec.name for spec in read_specs(files_of(tmp_path), "m.bin")} == {"a", "b", "c"}


def test_a_dtype_that_torch_lacks_is_refused() -> None:
    with pytest.raises(BadSpec, match="w is F6_E2M3, which PyTorch files cannot hold"):
        pytorch_write.lay_out("m.bin", [stored("w", "F6_E2M3", (4,))])
