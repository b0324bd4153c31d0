"""Files of a folder: what of them is in the page cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from loaders.storage import local

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells what is cached")

MB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.arange(3 * MB, dtype=np.uint8).tobytes())
    with path.open("rb+") as opened:
        os.fsync(opened.fileno())  # pages that were not written stay
    return path


def halve(path: Path) -> None:
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 2 * MB, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("tells", ["cachestat", "mincore"])
def test_what_is_cached_is_counted_over_the_whole_file(file: Path, tells: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if tells == "mincore":
        monkeypatch.setattr(local, "CACHESTAT", 100_000)  # a kernel without it
    if local.drop_cached(file) != 0:
        pytest.skip("this filesystem keeps its files in memory")
    file.read_bytes()
    assert local.cached_share(file) == 1
    halve(file)
    assert local.cached_share(file) == pytest.approx(1 / 3, abs=0.05)


def test_large_files_are_looked_at_in_windows_over_all_of_them(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CACHE_STEP", 128 << 10)
    if local.drop_cached(file) != 0:
        pytest.skip("this filesystem keeps its files in memory")
    file.read_bytes()
    halve(file)
    assert local.cached_share(file) == pytest.approx(1 / 3, abs=0.1)


def test_an_empty_file_has_no_share(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert local.cached_share(tmp_path / "empty") is None


def test_files_of_another_machines_disk_are_told_by_the_filesystem(tmp_path: Path) -> None:
    assert local.medium(tmp_path) in ("local", "rotational", "memory")
    assert local.medium(Path("/proc")) in ("local", "rotational")
    if os.path.ismount("/dev/shm"):
        assert local.medium(Path("/dev/shm")) == "memory"
