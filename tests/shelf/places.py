"""The places where tests put files and write outputs: a folder, or a prefix on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.objects.client import client_of
from tests.making import snapshot
from tests.shelf.client import Client
from tests.shelf.store import key_of

OBJECTS = ("s3", "az", "gs")
KINDS = ("folder", "shelf", *OBJECTS)  # the kinds of places, which the fixture `place_of` makes
REMOTE = KINDS[1:]
# Whole jobs take long, and what differs between the services of objects is tested by itself.
OF_JOBS = ("folder", "shelf", "s3")


class Place(Protocol):
    """A place for files. `put` creates a file, or replaces it by a new version."""

    address: Address

    def put(self, name: str, data: bytes) -> None: ...

    def drop(self, name: str) -> None: ...


class FolderPlace:
    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.address = Address.of(path)

    def put(self, name: str, data: bytes) -> None:
        path = self.address.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def drop(self, name: str) -> None:
        (self.address.path / name).unlink()


class ShelfPlace:
    def __init__(self, address: Address) -> None:
        self.address = address
        self._client = Client(address)

    def put(self, name: str, data: bytes) -> None:
        self._client.put(f"{key_of(self.address)}/{name}", data)

    def drop(self, name: str) -> None:
        self._client.delete(f"{key_of(self.address)}/{name}")


class ObjectPlace:
    """A prefix of a bucket."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def put(self, name: str, data: bytes) -> None:
        client, key = client_of(self.address / name)
        client.put(key, data)

    def drop(self, name: str) -> None:
        client, key = client_of(self.address / name)
        client.delete([key])


def fill(place: Place, folder: Path, name: str) -> Address:
    """Copy a folder into a place."""
    for path, data in snapshot(folder).items():
        place.put(f"{name}/{path}", data)
    return place.address / name


def contents(address: Address) -> dict[str, bytes]:
    """All files at an address, by name."""
    store = open_store(address)
    return {entry.name: bytes(store.read(entry, 0, entry.size)) for entry in store.list()}
