"""auto: by where the files lie, by what was measured, by the device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.storage import local
from loaders.strategies import AutoLoader, auto
from tests.loaders.strategies.writing import write
from tests.reading import files_of

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
    assert auto.choose(files_of(tmp_path / "m"), files)[0] == "read"  # too small to matter
    chosen, why = auto.choose(files_of(tmp_path / "m"), files, by_ranges=True)
    assert (chosen, why) == ("multithread", "0% of the files are in the page cache; threads fetch them ahead")
    monkeypatch.setattr(auto, "WORTH_MEASURING", 1000)
    monkeypatch.setattr(auto, "_RATES", {})
    chosen, why = auto.choose(files_of(tmp_path / "m"), files)
    [rates] = auto._RATES.values()
    assert chosen == max(rates, key=rates.__getitem__)
    assert set(rates) >= {"read", "lazy"}
    assert "0% of the files are in the page cache; measured here, GB/s: read " in why


def test_auto_takes_direct_storage_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastsafetensors")
    write(tmp_path / "m")
    monkeypatch.setattr(auto, "gds_available", lambda index=0: index == 1)
    files = ["model-00001-of-00002.safetensors"]
    assert auto.choose(files_of(tmp_path / "m"), files, "cuda:1")[0] == "fastsafetensors"
    assert auto.choose(files_of(tmp_path / "m"), files, "cuda:0")[0] != "fastsafetensors"
    assert auto.choose(files_of(tmp_path / "m"), files)[0] != "fastsafetensors"
