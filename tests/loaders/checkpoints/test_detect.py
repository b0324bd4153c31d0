"""Which format a file is: its bytes decide, then its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loaders import BadCheckpoint, BadSpec, WeightFormat, detect_weight_format
from loaders.containers import CONTAINERS
from loaders.places import DEMO

torch = pytest.importorskip("torch")


# --- formats


@pytest.mark.quick
def test_formats_are_the_containers() -> None:
    assert {found.value for found in WeightFormat} == {*CONTAINERS, "unknown"}, "WeightFormat and its first bytes"
    assert WeightFormat.CUSTOM is WeightFormat.PACKED


def files(source: Path, folder: Path, weightmill: Callable[..., Any]) -> dict[WeightFormat, Path]:
    """A file of each format."""
    made = {WeightFormat.SAFETENSORS: sorted(source.glob("*.safetensors"))[0]}
    for found, extra in ((WeightFormat.PYTORCH, ["output.container=pytorch"]), (WeightFormat.GGUF, ["output=gguf"])):
        out = folder / found.value
        path = DEMO
        ran = weightmill("run", f"model.path={path}", f"output.path={out}", "quant=none", *extra)
        assert ran.status == 0, ran.err
        made[found] = next(p for p in sorted(out.iterdir()) if p.suffix in (".bin", ".gguf"))
    return made


@pytest.mark.quick
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
