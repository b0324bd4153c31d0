"""Where bytes lie. A kind of store is one file in this folder, and one row of KINDS."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from loaders.errors import BadSpec
from loaders.storage.address import LOCAL, Address
from loaders.storage.base import Abandoned, Destination, Store
from loaders.storage.folder import Folder
from loaders.storage.folder_destination import FolderDestination, abandoned_in, discard_folder


@dataclass(frozen=True, slots=True)
class StoreKind:
    """How stores of a scheme are opened; what cannot be written to has no `destination`.

    open: the store at an address.
    destination: an output under way at an address, for the job that a key names.
    abandoned: what interrupted jobs left at an address of outputs, or of its output of one name.
    discard: removes something that was left.
    """

    open: Callable[[Address], Store]
    destination: Callable[[Address, str], Destination] | None = None
    abandoned: Callable[[Address, str | None], tuple[Abandoned, ...]] = lambda address, name: ()
    discard: Callable[[Address], None] = lambda address: None


KINDS: dict[str, StoreKind] = {
    LOCAL: StoreKind(
        lambda address: Folder(address.path),
        FolderDestination,
        lambda address, name: abandoned_in(address.path, name),
        lambda address: discard_folder(address.path),
    )
}


def open_store(where: str | os.PathLike[str] | Address) -> Store:
    """Open the store at an address.

    Raises:
        BadSpec: no store of its scheme is known.
    """
    address = Address.of(where)
    return kind_of(address).open(address)


def destination_at(address: Address, key: str) -> Destination:
    """An output under way at an address, for the job that `key` names.

    Raises:
        BadSpec: nothing can be written there.
    """
    destination = kind_of(address).destination
    if destination is None:
        raise BadSpec(f"{address}: {address.scheme}:// can be read, not written; choose a folder")
    return destination(address, key)


def kind_of(address: Address) -> StoreKind:
    """What is known of an address's scheme.

    Raises:
        BadSpec: nothing.
    """
    kind = KINDS.get(address.scheme)
    if kind is None:
        others = ", ".join(f"{name}://" for name in KINDS if name != LOCAL) or "folders alone"
        raise BadSpec(f"{address.scheme}:// is not read or written yet ({others} are); fetch it into a folder first")
    return kind
