"""A second kind of store, for tests: objects on a small server in another process, addressed by shelf://HOST:PORT/PATH.

Its objects cannot be memory-mapped, renamed or written at an offset, and have no mtime. Every object has a version, and
reading another version is refused. It is as restricted as an object store, so code that works with a folder and with
this store should work with other stores too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loaders.places import ROOT
from loaders.storage import KINDS, StoreKind
from loaders.storage.address import Address
from tests.shelf.destination import ShelfDestination, abandoned_at, discard
from tests.shelf.store import Shelf

SCHEME = "shelf"


def register() -> None:
    """Register this kind of store, as a row of KINDS in loaders/storage/__init__.py does."""
    KINDS[SCHEME] = StoreKind(Shelf, ShelfDestination, abandoned_at, discard)


@contextmanager
def serving() -> Iterator[Address]:
    """Run an empty server during the block; yields its address."""
    command = [sys.executable, "-m", "tests.shelf.server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = re.fullmatch(r"listening on (\d+)\n", server.stdout.readline())
        assert port is not None
        register()
        try:
            yield Address.of(f"{SCHEME}://127.0.0.1:{port[1]}")
        finally:
            del KINDS[SCHEME]
            server.terminate()
