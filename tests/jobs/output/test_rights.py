"""Rights: copies have no more than the umask gives, what cannot be read is an error, and nobody plants a journal."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loaders.errors import BadSpec, StorageError
from loaders.storage import ownership
from loaders.storage.address import Address
from loaders.storage.folder import Folder
from loaders.storage.folder_destination import FolderDestination, abandoned_in
from loaders.storage.ownership import make_own
from tests.conftest import Ran
from tests.making import write_checkpoint
from tests.other_users import NOBODY, as_nobody

Run = Callable[..., Ran]


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


@pytest.mark.parametrize(
    ("mode", "mask", "becomes"),
    [
        (0o644, 0o022, 0o644), (0o444, 0o022, 0o444), (0o755, 0o022, 0o755), (0o4755, 0o022, 0o755),
        (0o2755, 0o022, 0o755), (0o1666, 0o022, 0o644), (0o777, 0o077, 0o700), (0o644, 0o077, 0o600),
        (0o600, 0o022, 0o600), (0o040, 0o022, 0o440), (0o666, 0o002, 0o664),
    ],
)  # fmt: skip
def test_a_copy_has_the_rights_that_the_umask_gives(
    mode: int, mask: int, becomes: int, umask: Callable[[int], None], tmp_path: Path, weightmill: Run
) -> None:
    if mode == 0o040 and os.geteuid() != 0:
        pytest.skip("only root reads a file without a right to")
    source = write_checkpoint(tmp_path / "source")
    (source / "sub").mkdir()
    (source / "sub" / "tool.py").write_text("print()")
    (source / "sub" / "tool.py").chmod(mode)
    umask(mask)
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=none")
    assert ran.status == 0, ran.err
    assert stat.S_IMODE((tmp_path / "out" / "sub" / "tool.py").stat().st_mode) == becomes
    assert weightmill("verify", tmp_path / "out").status == 0


def test_copies_of_long_paths_do_not_meet_on_their_way(tmp_path: Path, weightmill: Run) -> None:
    source = write_checkpoint(tmp_path / "source")
    paths = ["/".join("d" * 90) + "/a", "/".join(["long" * 50] * 3), "a/b%c", "a%b/c", "a%b%c"]
    for path in paths:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(path)
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=none")
    assert ran.status == 0, ran.err
    assert [(tmp_path / "out" / path).read_text() for path in paths] == paths


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of another user's, on a path that everybody may enter."""
    with tempfile.TemporaryDirectory(prefix="place-", dir="/tmp", ignore_cleanup_errors=True) as made:
        Path(made).chmod(0o755)
        yield Path(made)


def given_to_nobody(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


def test_a_source_that_is_read_only_is_copied_by_its_reader(tmp_path: Path, place: Path) -> None:
    source = write_checkpoint(place / "source")
    for path in source.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    source.chmod(0o555)
    out = place / "out"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    ran = as_nobody("-m", "jobs.run", f"model.path={source}", f"output.path={out / 'made'}", "quant=none",
                    "tracking=none", cwd=out, environment={"HOME": str(out)})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert stat.S_IMODE((out / "made" / "tokenizer.json").stat().st_mode) == 0o444


def test_a_folder_that_cannot_be_read_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(place / "source")
    (source / "secret").mkdir()
    (source / "secret" / "file.txt").write_text("there")
    honest = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StorageError, match=r"looking into .*/secret: Permission denied; check who owns it"):
        Folder(source).list()


def test_a_file_that_cannot_be_read_is_refused_before_any_work(
    tmp_path: Path, weightmill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "notes.txt").write_text("mine")
    honest = os.access
    monkeypatch.setattr(
        os, "access", lambda path, *given, **how: not str(path).endswith("notes.txt") and honest(path, *given, **how)
    )
    ran = weightmill("plan", f"model.path={source}", "quant=none")
    assert ran.status == 1
    assert "notes.txt: Permission denied; check who owns it, or move it out of the checkpoint" in ran.err


def test_a_name_that_is_no_utf8_is_refused_before_any_work(tmp_path: Path, weightmill: Run) -> None:
    source = write_checkpoint(tmp_path / "source")
    Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.txt")).write_text("a file")
    for verb in ("plan", "run"):
        ran = weightmill(verb, f"model.path={source}", "quant=none")
        assert ran.status == 1
        assert r"caf\udce9.txt: the name is no UTF-8; give the file another, or move it away" in ran.err


# --- planted journals


@pytest.fixture
def journal(tmp_path: Path) -> FolderDestination:
    return FolderDestination(Address(str(tmp_path / "out")), "0123456789abcdef")


@pytest.mark.parametrize("planted", ["journal", "files", "parts", "records", "pieces", "a file"])
def test_a_journal_that_is_a_link_is_refused(planted: str, journal: FolderDestination, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("precious")
    if planted == "journal":
        journal.root.symlink_to(victim)
    elif planted == "a file":
        journal.root.mkdir()
        (journal.root / "files").write_text("")
    else:
        journal.root.mkdir()
        (journal.root / planted).symlink_to(victim)

    said = "a link or a file, where weightmill makes a folder|File exists"
    with pytest.raises((BadSpec, StorageError), match=said), journal.claim():
        journal.prepare(overwrite=False)
    assert (victim / "precious.txt").read_text() == "precious"
    assert [*victim.iterdir()] == [victim / "precious.txt"]
    if planted == "journal":
        assert abandoned_in(tmp_path) == ()
    if planted == "files":
        journal.forget()
    assert (victim / "precious.txt").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_journal_of_another_user_is_refused(tmp_path: Path, weightmill: Run) -> None:
    source = write_checkpoint(tmp_path / "source")
    given = ("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=none")
    said = weightmill("plan", *given[1:], "format=json")
    assert said.status == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.orchestration.job.publish", lambda *_, **__: (_ for _ in ()).throw(StorageError("no")))
        assert weightmill(*given).status == 1
    [left] = tmp_path.glob(".out.*.weightmill")
    given_to_nobody(left)
    ran = weightmill(*given)
    assert ran.status == 2
    assert f"made by the user {NOBODY}, this is 0; what is in it is not trusted" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_filesystem_that_writes_down_other_users_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does of root."""
    make_own(tmp_path / "journal", ["files"])
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    make_own(tmp_path / "journal", ["files"])
    monkeypatch.setattr(ownership, "_made_in", lambda folder: os.stat_result((0o40700, 0, 0, 0, NOBODY, *[0] * 5)))
    with pytest.raises(BadSpec, match="is not trusted"):
        make_own(tmp_path / "journal", ["files"])


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o772])
def test_a_journal_that_others_may_write_is_refused(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal"
    journal.mkdir()
    journal.chmod(mode)
    with pytest.raises(BadSpec, match="journal: others may write to it; what is in it is not trusted: remove it, or"):
        make_own(journal, ["files"])
    # As on a filesystem that has one mode for everything.
    monkeypatch.setattr(ownership, "_made_in", lambda folder: os.stat_result((0o40777, *[0] * 9)))
    make_own(journal, ["files"])


def test_nobody_else_reaches_into_a_journal(tmp_path: Path, umask: Callable[[int], None]) -> None:
    umask(0)
    make_own(tmp_path / "journal", ["files"])
    make_own(tmp_path / "journal", ["files"])
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "journal" / "files").stat().st_mode) == 0o777  # it becomes the output


PLANTED = ("lock", "job.json", "files/qmodel.pt", "files/sub", "records/unit-00001.json", "parts/x", "replaced")


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("what", ["link", "fifo"])
def test_no_link_within_a_journal_is_followed(name: str, what: str, journal: FolderDestination, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with journal.claim():
        journal.prepare(overwrite=False)
    planted = journal.root / name
    planted.unlink(missing_ok=True)
    planted.symlink_to(victim) if what == "link" else os.mkfifo(planted)
    said = "a link, or no file, where weightmill|neither a file nor a folder, where weightmill"
    with pytest.raises((BadSpec, StorageError), match=said), journal.claim():
        journal.prepare(overwrite=False)
    with pytest.raises(StorageError):
        journal.shared(name, 100)
    assert victim.read_text() == "precious"
    journal.forget()
    assert victim.read_text() == "precious"


# --- what `clean` takes for a journal


@pytest.mark.parametrize("plant", ["file", "link", "fifo", "lock", "linked area", "other"])
def test_clean_removes_nothing_that_has_only_the_name_of_a_journal(plant: str, tmp_path: Path, weightmill: Run) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    folder = tmp_path / "outputs"
    named, left = (folder / f".{name}.0123456789ab.weightmill" for name in ("named", "left"))
    (left / "records").mkdir(parents=True)
    if plant == "file":
        named.write_text("")
    elif plant == "link":
        named.symlink_to(victim)
    elif plant == "fifo":
        os.mkfifo(named)
    else:
        named.mkdir()
        if plant == "lock":
            os.mkfifo(named / "lock")
        elif plant == "linked area":
            (named / "files").symlink_to(victim)
        else:
            (named / "photos").mkdir()
    ran = weightmill("clean", f"output.root={folder}", "delete=true")
    assert ran.status == 0, ran.err
    assert os.path.lexists(named)
    assert not left.exists()
    assert (victim / "precious").exists()


def test_clean_goes_on_past_what_it_cannot_remove(
    tmp_path: Path, weightmill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / f".{name}.0123456789ab.weightmill").mkdir()
    honest = shutil.rmtree

    def rmtree(path: Any, *given: Any, **how: Any) -> None:
        if ".a." in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        honest(path, *given, **how)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    ran = weightmill("clean", f"output.root={tmp_path}", "delete=true")
    assert ran.status == 1
    assert ".a.0123456789ab.weightmill: Permission denied" in ran.err
    assert [path.name[:3] for path in tmp_path.glob(".*.weightmill")] == [".a."]
