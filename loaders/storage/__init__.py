"""Stores and destinations by the scheme of their address. A kind of store is one file here, and one row of KINDS."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loaders.errors import BadSpec
from loaders.storage.address import IN_MLFLOW, LOCAL, Address
from loaders.storage.base import Abandoned, Destination, Store
from loaders.storage.folder import Folder, folders_in
from loaders.storage.folder_destination import FolderDestination, abandoned_in, discard_folder
from loaders.storage.hub.names import source_address
from loaders.storage.lone_file import SUFFIXES, LoneFile
from loaders.storage.objects.destination import ObjectDestination
from loaders.storage.objects.leftovers import abandoned_at, discard
from loaders.storage.objects.store import ObjectStore, folders_at
from loaders.storage.range_cache import cached
from loaders.storage.settings import current


@dataclass(frozen=True, slots=True)
class StoreKind:
    """The functions that serve one address scheme. `destination` is None for a scheme that can only be read.

    open: opens the store at an address.
    destination: makes the unpublished output at an address, for the job with a key.
    abandoned: lists what interrupted jobs left in the folder at an address: of every output, or of one by its name.
    discard: removes what an interrupted job left.
    folders: lists the names of the folders directly below an address, hidden ones left out: at most so many.
    """

    open: Callable[[Address], Store]
    destination: Callable[[Address, str], Destination] | None = None
    abandoned: Callable[[Address, str | None], tuple[Abandoned, ...]] = lambda address, name: ()
    discard: Callable[[Address], None] = lambda address: None
    folders: Callable[[Address, int], Sequence[str]] = lambda address, most: ()


def _hub(address: Address) -> Store:
    from loaders.storage.hub.store import HubStore

    return HubStore(address)


def _hub_destination(address: Address, key: str) -> Destination:
    from loaders.storage.hub.destination import HubDestination

    return HubDestination(address, key)


def _abandoned_on_hub(address: Address, name: str | None) -> tuple[Abandoned, ...]:
    from loaders.storage.hub.destination import abandoned_at

    return abandoned_at(address, name)


KINDS: dict[str, StoreKind] = {
    "hf": StoreKind(_hub, _hub_destination, _abandoned_on_hub),
    LOCAL: StoreKind(
        lambda address: Folder(address.path),
        FolderDestination,
        lambda address, name: abandoned_in(address.path, name),
        lambda address: discard_folder(address.path),
        lambda address, most: folders_in(address.path, most),
    ),
    **dict.fromkeys(("s3", "gs", "az"), StoreKind(ObjectStore, ObjectDestination, abandoned_at, discard, folders_at)),
    **dict.fromkeys(("http", "https"), StoreKind(ObjectStore)),
}


def open_store(where: str | os.PathLike[str] | Address) -> Store:
    """Open the store at an address: a path, file://PATH, or a URL of a scheme in KINDS.

    Raises:
        BadSpec: the scheme is not in KINDS.
    """
    address = Address.of(where)
    return cached(kind_of(address).open(address), current())


def open_source(where: str | os.PathLike[str] | Address) -> Store:
    """Open the store of a model at an address: of a folder, or of one weight file, with what lies beside it.

    A text OWNER/NAME that is no path here is a repository of the Hub.

    Raises:
        BadSpec: the scheme is not in KINDS.
        StorageError: it cannot be told whether a file is there.
    """
    address = source_address(where)
    if not address.name.endswith(SUFFIXES):
        return open_store(address)
    folder = open_store(address.parent)
    return open_store(address) if folder.find(address.name) is None else LoneFile(folder, address.name)


def destination_at(address: Address, key: str) -> Destination:
    """Return the unpublished output at an address, for the job with a key. Nothing is created yet.

    Raises:
        BadSpec: the scheme is not in KINDS, or can only be read.
    """
    destination = kind_of(address).destination
    if destination is None:
        others = ", ".join(f"{name}://" for name, kind in KINDS.items() if name != LOCAL and kind.destination)
        raise BadSpec(f"{address}: {address.scheme}:// can be read, not written; choose a folder, or one of {others}")
    return destination(address, key)


def kind_of(address: Address) -> StoreKind:
    """Return the functions that serve an address's scheme.

    Raises:
        BadSpec: the scheme is not in KINDS.
    """
    kind = KINDS.get(address.scheme)
    if kind is None and address.scheme in IN_MLFLOW:
        raise BadSpec(f"{address} is read by jobs alone, which ask MLflow for its address: give the store's own")
    if kind is None:
        others = ", ".join(f"{name}://" for name in KINDS if name != LOCAL) or "folders alone"
        raise BadSpec(f"{address.scheme}:// is not read or written yet ({others} are); fetch it into a folder first")
    return kind
