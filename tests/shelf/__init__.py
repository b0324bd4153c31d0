"""A second kind of store, for tests: objects on a small server in another process, reached as shelf://HOST:PORT/PATH.

Nothing of it can be mapped, renamed, written at an offset or asked for its time of change; every object has a version,
and reading another one is refused. What holds over a folder and over this holds over stores to come.
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
    """Make weightmill know this kind of store, as a row in loaders/storage/__init__.py would."""
    KINDS[SCHEME] = StoreKind(Shelf, ShelfDestination, abandoned_at, discard)


@contextmanager
def serving() -> Iterator[Address]:
    """A server with empty shelves, for as long as the block lasts."""
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
