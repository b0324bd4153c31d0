"""Hashes, shapes, shared tensors, and which format a file is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from loaders import (
    BadCheckpoint,
    BadSpec,
    StreamingWeightLoader,
    WeightFormat,
    WeightSpec,
    compute_weight_hash,
    detect_weight_format,
    filter_shared_tensors,
    validate_weight_shapes,
)
from loaders.dtypes import DTYPES

torch = pytest.importorskip("torch")


def spec(name: str, *shape: int, offset: int = 0) -> WeightSpec:
    dtype = DTYPES["BF16"]
    return WeightSpec(name, dtype, shape, "model.safetensors", offset, dtype.size(shape))


def test_a_spec_is_hashable_and_counts() -> None:
    assert len({spec("a", 2, 3), spec("a", 2, 3), spec("b", 2, 3)}) == 2
    assert spec("a", 2, 3).numel() == 6


def test_equal_bits_have_equal_hashes_whatever_holds_them() -> None:
    raw = np.arange(24, dtype=np.uint16)
    wanted = xxhash.xxh3_128_hexdigest(raw.tobytes())
    as_torch = torch.from_numpy(raw.view(np.int16).copy()).view(torch.bfloat16).reshape(4, 6)
    held = [raw, raw.reshape(4, 6), raw.tobytes(), memoryview(raw), raw.astype(">u2"), as_torch, as_torch.clone()]
    assert {compute_weight_hash(each) for each in held} == {wanted}
    crooked = as_torch.t().contiguous().t()
    assert not crooked.is_contiguous()
    assert compute_weight_hash(crooked) == wanted
    assert compute_weight_hash(raw[::-1]) != wanted
    assert compute_weight_hash(np.empty(0, np.float32)) == compute_weight_hash(b"")
    assert compute_weight_hash(torch.tensor(1.0)) == compute_weight_hash(np.float32(1).tobytes())
    with pytest.raises(TypeError, match="found list"):
        compute_weight_hash([1.0])


def test_the_same_hash_whatever_the_container(source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", "quant=none", "output.container=pytorch")
    assert ran.status == 0, ran.err
    one, other = (
        {name: compute_weight_hash(a) for name, a in StreamingWeightLoader().iterate_weights(root)}
        for root in (source, out)
    )
    assert one == other


def test_every_difference_of_shapes_is_listed() -> None:
    specs = {"a": spec("a", 2, 3), "b": spec("b", 4), "d": spec("d", 1)}
    validate_weight_shapes(specs, {"a": (2, 3), "b": torch.empty(4), "d": [1]})
    with pytest.raises(BadCheckpoint) as caught:
        validate_weight_shapes(specs.values(), {"a": (3, 2), "b": (4,), "c": (7,)})
    assert str(caught.value).splitlines() == [
        "3 weights are not as expected:",
        "a: expected [3, 2], found [2, 3]",
        "c: missing, expected [7]",
        "d: not expected, found [1]",
    ]


def test_shared_tensors_are_kept_once() -> None:
    table, other = torch.ones(4, 2), torch.ones(4, 2)
    kept, same = filter_shared_tensors(
        {"embed": table, "head": table, "copy": other, "part": table[:2], "turned": table.t(), "none": torch.empty(0)}
    )
    assert list(kept) == ["embed", "copy", "part", "turned", "none"]
    assert same == {"head": "embed"}
    array = np.ones((3, 3), np.float32)
    assert filter_shared_tensors({"a": array, "b": array, "c": array.copy()})[1] == {"b": "a"}
    specs = {"a": spec("a", 2), "b": spec("b", 2), "c": spec("c", 2, offset=4)}
    assert filter_shared_tensors(specs)[1] == {"b": "a"}


# --- formats


def files(source: Path, folder: Path, weightmill: Callable[..., Any]) -> dict[WeightFormat, Path]:
    """A file of each format."""
    made = {WeightFormat.SAFETENSORS: sorted(source.glob("*.safetensors"))[0]}
    for found, extra in ((WeightFormat.PYTORCH, ["output.container=pytorch"]), (WeightFormat.GGUF, ["output=gguf"])):
        out = folder / found.value
        path = Path(__file__).parents[2] / "jobs" / "demo"
        ran = weightmill("run", f"model.path={path}", f"output.path={out}", "quant=none", *extra)
        assert ran.status == 0, ran.err
        made[found] = next(p for p in sorted(out.iterdir()) if p.suffix in (".bin", ".gguf"))
    return made


def test_bytes_decide_before_the_name(source: Path, tmp_path: Path, weightmill: Any) -> None:
    for number, (found, path) in enumerate(files(source, tmp_path, weightmill).items()):
        assert detect_weight_format(path) is found
        assert detect_weight_format(path.parent) is found
        for suffix in (".gguf", ".bin", ".safetensors", ".anything", ""):
            other = tmp_path / f"lying{number}{suffix}"
            shutil.copy(path, other)
            assert detect_weight_format(other) is found, (found, suffix)
        raw = path.read_bytes()
        for cut in (20, len(raw) // 2, len(raw) - 1):
            short = tmp_path / f"short{number}-{cut}{path.suffix}"
            short.write_bytes(raw[:cut])
            with pytest.raises(BadCheckpoint, match="fetch"):
                detect_weight_format(short)


def test_a_pickle_is_taken_at_its_word_or_its_name(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert detect_weight_format(path) is WeightFormat.PYTORCH
    assert detect_weight_format(path.rename(tmp_path / "old.dat")) is WeightFormat.PYTORCH


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a page of a website"),
        (b"\x00" * 64, "it begins with"),
    ],
)
def test_what_is_not_what_its_name_says_is_an_error(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=f"its name says safetensors, but.*{said}"):
        detect_weight_format(path)
    assert detect_weight_format(path.rename(tmp_path / "notes.txt")) is WeightFormat.UNKNOWN


def test_a_folder_without_weights_is_unknown_and_nothing_is_refused(tmp_path: Path) -> None:
    assert detect_weight_format(tmp_path) is WeightFormat.UNKNOWN
    with pytest.raises(BadSpec, match="found nothing there"):
        detect_weight_format(tmp_path / "no")
