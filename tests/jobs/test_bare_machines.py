"""Users without a home, a name or rights, and machines of which little may be written: everything runs."""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.cli.home import have_home, have_temporary_folder
from loaders.storage import user_cache
from loaders.storage.user_cache import default_folder, temporary_folder
from tests.other_users import NOBODY, as_nobody


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may write, on a path that everybody may enter: pytest's own is private."""
    with tempfile.TemporaryDirectory(prefix="place-", dir="/tmp", ignore_cleanup_errors=True) as made:
        Path(made).chmod(0o777)
        yield Path(made)


def check(ran: Any, status: int = 0) -> None:
    assert ran.returncode == status, ran.stderr
    assert "Traceback" not in ran.stderr + ran.stdout
    assert "matplotlib" not in ran.stderr


def test_a_user_without_home_and_name_runs_every_verb(place: Path) -> None:
    """As in a container with any user id, whose installation is root's."""
    temporary = place / "tmp"
    temporary.mkdir(mode=0o777)
    temporary.chmod(0o777)
    given = {"cwd": place, "environment": {"TMPDIR": str(temporary)}}
    ran = as_nobody("-m", "jobs.run", "tracking=none", **given)
    check(ran)
    kept = temporary / f"weightmill-{NOBODY}"
    assert (
        f"compiling kernels for this machine, which are kept in {kept}/.cache/weightmill/kernels: some seconds"
        in ran.stderr
    )
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    out = place / "outputs" / "demo-nf4"
    for verb, *words in (["inspect", out], ["lint", out], ["verify", out], ["run", "--help"]):
        ran = as_nobody("-m", f"jobs.{verb}", *words, **given)
        check(ran)
        assert "compiling" not in ran.stderr or verb == "verify"  # which compares, and needs other kernels
    assert {each.name for each in place.iterdir()} == {"tmp", "outputs"}


NO_WRITING = "mount --bind {0} {0} && mount -o remount,bind,ro / && mount -t tmpfs -o ro none /dev/shm"


@pytest.mark.slow
def test_a_machine_that_is_read_only_but_for_the_output_runs_a_job(place: Path) -> None:
    # Alembic, which makes MLflow's store, asks access(2), for which the right to read everything does not count.
    is_open = all(each.stat().st_mode & stat.S_IXOTH for each in Path(sys.prefix).resolve().parents)
    ran = as_nobody(
        "-m", "jobs.run", f"output.root={place}", *([] if is_open else ["tracking=none"]), cwd=Path("/"),
        environment={"HOME": "/root"}, mounts=NO_WRITING.format(place),
    )  # fmt: skip
    check(ran)
    assert {each.name for each in place.iterdir()} >= ({"demo-nf4", "mlflow.db"} if is_open else {"demo-nf4"})


def test_without_any_folder_for_kernels_they_are_compiled_all_the_same(place: Path) -> None:
    ran = as_nobody(
        "-m", "jobs.run", f"output.path={place / 'out'}", "tracking=none", cwd=Path("/"),
        environment={"HOME": "/root", "WEIGHTMILL_CACHE": "/nowhere"}, mounts=NO_WRITING.format(place),
    )  # fmt: skip
    check(ran)
    assert "which are not kept, since no folder for them can be written (NUMBA_CACHE_DIR names one)" in ran.stderr


def test_an_output_that_cannot_be_written_is_one_line(place: Path) -> None:
    for verb, status in (("plan", 0), ("run", 1)):
        ran = as_nobody("-m", f"jobs.{verb}", "tracking=none", cwd=Path("/"), environment={"HOME": "/"})
        check(ran, status)
    assert re.search("weightmill: failed: making /outputs/.*: Permission denied; check who owns it", ran.stderr)


@pytest.mark.slow
def test_ray_runs_without_home_and_shared_memory(place: Path) -> None:
    ran = as_nobody(
        "-m", "jobs.run", f"output.path={place / 'out'}", "tracking=none", "cluster=ray", cwd=Path("/"),
        mounts="umount -l /dev/shm",
    )  # fmt: skip
    check(ran)


# --- where things are kept


def test_a_folder_that_others_have_planted_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = tmp_path / f"weightmill-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    planted.symlink_to(elsewhere)
    assert temporary_folder() is None
    planted.unlink()
    planted.write_text("a file")
    assert temporary_folder() is None
    planted.unlink()
    assert temporary_folder() == planted
    planted.chmod(0o777)
    assert temporary_folder() is None


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    if tmp_path.stat().st_uid == NOBODY:
        pytest.skip("this user has the id that stands for another")
    assert temporary_folder() is None


@pytest.mark.parametrize("home", [None, "/nowhere/at/all", "relative"])
def test_libraries_find_a_home(home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(user_cache.VARIABLE, raising=False)

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    if home is None:
        monkeypatch.setattr(Path, "home", unknown)
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    ours = tmp_path / f"weightmill-{os.getuid()}"
    if home is None:
        assert default_folder() == ours
    have_home()
    assert os.environ["HOME"] == str(ours)
    assert ours.is_dir()


def test_a_home_that_is_only_read_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MPLCONFIGDIR", "")
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setattr(os, "access", lambda *_: False)
    have_home()
    assert os.environ["HOME"] == str(tmp_path)
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "tmp" / f"weightmill-{os.getuid()}" / "matplotlib")


def test_temporary_files_go_to_the_outputs_where_nothing_else_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    spec: Any = SimpleNamespace(output=SimpleNamespace(local_root=tmp_path / "new"))
    have_temporary_folder(spec)
    assert (os.environ["TMPDIR"], (tmp_path / "new").is_dir()) == (str(tmp_path / "new"), True)
