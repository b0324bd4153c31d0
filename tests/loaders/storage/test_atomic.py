"""Files that appear whole or not at all; locks."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loaders import AtomicWriter, StorageError, atomic_writer, file_lock, get_file_lock_path
from loaders.storage.atomic import exclusive, write_file

pytestmark = pytest.mark.quick


def test_text_and_bytes_appear_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with AtomicWriter(path) as file:
        file.write(b"\x00\xff")
        assert not path.exists()
    assert path.read_bytes() == b"\x00\xff"
    with atomic_writer(path, "w") as file:
        file.write("größer\n")
        assert path.read_bytes() == b"\x00\xff"
    assert path.read_text(encoding="utf-8") == "größer\n"
    with atomic_writer(path, "w", "latin-1") as file:
        file.write("ö")
    assert path.read_bytes() == b"\xf6"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_file(path, bytes([number]) * 1000), range(64)))
    assert len(set(path.read_bytes())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["body", "fsync", "replace", "encoding"])
def test_what_was_there_stays_on_any_failure(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if step == "replace":
        monkeypatch.setattr(Path, "replace", fail)

    def attempt() -> None:
        with atomic_writer(path, "w", encoding="ascii") as file:
            file.write("new" if step != "encoding" else "ö")
            if step == "body":
                raise ZeroDivisionError

    with pytest.raises((StorageError, ZeroDivisionError, UnicodeEncodeError)) as caught:
        attempt()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    if step in ("fsync", "replace"):
        assert str(path) in str(caught.value)


def test_a_killed_process_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        f"import os; from loaders import atomic_writer\nwith atomic_writer({str(path)!r}) as f:\n"
        " f.write(b'new'); f.flush(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert path.read_text() == "old"


def test_mode_bits_are_kept_or_the_umasks(tmp_path: Path) -> None:
    path, new = tmp_path / "file", tmp_path / "new"
    path.write_text("old")
    path.chmod(0o640)
    before = os.umask(0o027)
    try:
        for each in (path, new):
            with atomic_writer(each, "w") as file:
                file.write("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(new.stat().st_mode) == 0o640  # 666 less 027


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link, dangling = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "far" / "later")
    for each in (link, dangling):
        with atomic_writer(each, "w") as file:
            file.write("new")
        assert each.is_symlink()
        assert each.read_text() == "new"
    assert target.read_text() == "new"


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'wb' or 'w', found 'a'"):
        AtomicWriter(tmp_path / "x", "a")
    with pytest.raises(ValueError, match="is for text"):
        AtomicWriter(tmp_path / "x", "wb", "utf-8")
    for place in (tmp_path / "no" / "x", tmp_path):
        with pytest.raises(StorageError, match=f"writing {place}"), atomic_writer(place):
            pass


def test_a_lock_whose_file_was_removed_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last holder has published, and removed it, between its opening and its taking by another."""
    lock = fcntl.flock

    def late(file: Any, how: int) -> None:
        (tmp_path / "lock").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with exclusive(tmp_path / "lock") as is_held:
        assert not is_held


def test_a_lock_keeps_other_processes_and_threads_out(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert get_file_lock_path(path) == tmp_path / ".model.safetensors.lock"
    link = tmp_path / "link"
    link.symlink_to(path)
    assert get_file_lock_path(link) == get_file_lock_path(path)
    shared = get_file_lock_path("org/model", tmp_path / "locks")
    assert shared.parent == tmp_path / "locks"
    assert shared == get_file_lock_path(model_name_or_path="org/model", cache_dir=str(tmp_path / "locks"))
    assert shared != get_file_lock_path("org/other", tmp_path / "locks")
    assert shared.name.endswith("-org-model.lock")
    assert len(get_file_lock_path("long/" * 200, tmp_path).name) < 255
    code = f"from loaders import file_lock\nwith file_lock({str(path)!r}, 0.05): print('held')"
    with file_lock(path):
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process holds its lock" in ran.stderr
        said: list[str] = []

        def attempt() -> None:
            try:
                with file_lock(path, 0.05):
                    said.append("held")
            except StorageError as error:
                said.append(str(error))

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        assert "holds its lock" in said[0]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "held\n"


def test_the_library_is_imported_without_torch_or_numba() -> None:
    code = "import sys, loaders; loaders.atomic_writer; print([m for m in ('torch', 'numba') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
