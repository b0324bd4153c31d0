"""MLflow's sqlite file: made whole or not at all, and one that is not whole is recognized.

Making one means about forty migrations, which take a second and are no transaction: a process that is killed meanwhile,
or another that does the same, would leave a file that MLflow neither uses nor completes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from loaders.errors import StorageError
from loaders.storage.atomic import sync_folder

SQLITE = "sqlite:///"
LOCK_S = 120  # seconds to wait for another process that makes the file
# What a store's own migrations say where others have stopped half-way.
HALF_MADE = ("already exists", "duplicate column name", "no such table", "no such column")


@contextmanager
def whole_store(uri: str, open_client: Callable[[str], Any]) -> Iterator[Any]:
    """Yield a client of MLflow for a store; while the block runs, no other job makes or changes a sqlite file there.

    Raises:
        StorageError: the sqlite file cannot be made, or was left half-made.
    """
    if not uri.startswith(SQLITE):
        yield open_client(uri)
        return
    path = file_of(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    # In a read-only folder this raises at once; FileLock would wait until its timeout.
    lock.touch()
    with FileLock(lock, timeout=LOCK_S):
        was_there = not is_missing(path)
        if not was_there:
            _make(path, open_client)
        try:
            yield open_client(uri)
        # Errors of sqlalchemy, or MLflow's of these.
        except Exception as error:
            if was_there and _is_half_made(path, error):
                raise StorageError(
                    f"{path} is no whole store of MLflow: a job was killed while it was made, or it is none; move it"
                    " away, and the next job makes another"
                ) from error
            raise


def file_of(uri: str) -> Path:
    """Return the path of the file that an address of sqlite means."""
    return Path(uri.removeprefix(SQLITE))


def is_missing(path: Path) -> bool:
    """Whether there is no store at a path, or an empty file, as sqlite makes it of a path that it opens."""
    try:
        return path.stat().st_size == 0
    except OSError:
        return True


def _make(path: Path, open_client: Callable[[str], Any]) -> None:
    """Make a store beside its place, and rename it. The caller holds the lock, so that one process makes it."""
    new = path.with_name(f".{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-journal"), new.with_name(f"{new.name}-wal")):
        left.unlink(missing_ok=True)
    client = open_client(f"{SQLITE}{new}")
    client.search_experiments(max_results=1)
    # Its connections would keep the file open, and whatever of it is not written yet.
    client._tracking_client.store.engine.dispose()
    new.replace(path)
    sync_folder(path.parent)


def _is_half_made(path: Path, error: Exception) -> bool:
    if any(each in str(error) for each in HALF_MADE):
        return True
    # MLflow says of any other file that it is out of date, or nothing that helps.
    with suppress(sqlite3.Error):
        with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True) as opened:
            found = {name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        opened.close()
        return not {"alembic_version", "experiments", "runs"} <= found
    return True
