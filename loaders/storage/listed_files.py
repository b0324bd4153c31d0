"""Weight files that were named one by one, wherever they lie, as one store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from loaders.errors import BadSpec
from loaders.storage.address import Address
from loaders.storage.base import Entry, Range, Store


class ListedFiles(Store):
    """A `Store` of some files of one or several folders, and of what lies beside them by its own name.

    A file's name is its path from the nearest folder that is above all of them, which is the store's address; so files
    of one folder have the names that they have there. What is beside them (config.json) is that of the first folder
    which has it. `folders` are the stores of the files' folders, by their addresses.
    """

    def __init__(self, files: Sequence[Address], folders: Mapping[Address, Store]) -> None:
        self._root = _above(files)
        self._folders = folders
        self._places = {_name_below(self._root, file): (folders[file.parent], file.name) for file in files}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files, in the order in which they were given."""
        return tuple(self._places)

    @property
    def address(self) -> Address:
        return self._root

    @property
    def is_local(self) -> bool:
        return self._root.is_local

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        return tuple(sorted(entry for entry in map(self.find, self._places) if entry is not None))

    def find(self, name: str) -> Entry | None:
        store, own = self._place(name)
        found = store.find(own) if store is not None else None
        return None if found is None else replace(found, name=name)

    def check_inside(self, name: str, *, may_leave: bool = False) -> str | None:
        if name in self._places:  # it was named by who asked for it, and may be a link to anywhere
            return None
        store, own = self._place(name)
        return None if store is None else store.check_inside(own, may_leave=may_leave)

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        store, mine = self._own(entry)
        return store.read(mine, start, stop)

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        store, mine = self._own(entry)
        return store.read_ranges(mine, ranges)

    def check_unchanged(self, entry: Entry) -> None:
        store, mine = self._own(entry)
        store.check_unchanged(mine)

    def local_path(self, name: str) -> Path | None:
        return self._root.path / name if self.is_local else None

    def _own(self, entry: Entry) -> tuple[Store, Entry]:
        store, own = self._place(entry.name)
        assert store is not None
        return store, replace(entry, name=own)

    def _place(self, name: str) -> tuple[Store | None, str]:
        """Return where a file is: its folder's store, None if no folder has it, and its name there."""
        if name not in self._places:
            beside = "/" not in name
            store = next((each for each in self._folders.values() if beside and each.find(name) is not None), None)
            if store is None:
                return None, name
            self._places[name] = store, name
        return self._places[name]


def plain_address(where: str | os.PathLike[str] | Address) -> Address:
    """Return the address of a file of a list: of a local one, its absolute path, without a link among its folders
    where a part of the path goes back up.

    Raises:
        BadSpec: as `Address.of`.
    """
    address = Address.of(where)
    if not address.is_local:
        return address
    folder, name = os.path.split(address.text)
    whole = os.path.realpath(folder) if ".." in Path(folder).parts else os.path.abspath(folder)
    return Address(str(Path(whole) / name))


def _above(files: Sequence[Address]) -> Address:
    """Return the nearest folder above all files.

    Raises:
        BadSpec: there is none: they are in several stores.
    """
    first = files[0].parent
    found = next((each for each in (first, *first.parents) if all(_is_below(each, file) for file in files)), None)
    if found is None:
        other = next(file for file in files if not _is_below((first, *first.parents)[-1], file))
        raise BadSpec(f"files of one list lie in one store; {files[0]} and {other} lie in two: fetch them into one")
    return found


def _parts(address: Address) -> tuple[str, str, tuple[str, ...]]:
    """Return an address's scheme, host and path, by its parts."""
    if address.is_local:
        return address.scheme, "", Path(address.text).parts
    split = urlsplit(address.text)
    return split.scheme, split.netloc, PurePosixPath(split.path or "/").parts


def _is_below(folder: Address, file: Address) -> bool:
    scheme, host, path = _parts(folder)
    return (scheme, host, path) == (*_parts(file)[:2], _parts(file)[2][: len(path)])


def _name_below(folder: Address, file: Address) -> str:
    return "/".join(_parts(file)[2][len(_parts(folder)[2]) :])
