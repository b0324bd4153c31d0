"""The interface of a container: how its files are read, laid out and framed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from loaders.specs import OutputFile, StoredTensor, WeightSpec
from loaders.storage.base import PinnedFiles

Places = Mapping[str, tuple[int, int]]  # by tensor: its first byte in the file, and its number of bytes
Checksum = Callable[[int, int], int]  # CRC-32 of bytes [offset, offset + size) of the file


class LayOut(Protocol):
    """The function of a container that plans a file."""

    def __call__(self, file: str, tensors: list[StoredTensor], about: Any = None) -> OutputFile:
        """Give every tensor its place. `about` is the layout's metadata for the file.

        Raises:
            BadSpec: the container cannot hold one of them.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Container:
    """A kind of weight file: how it is read, laid out and framed, and what its files are called.

    place: returns the final places of the tensors, given the lengths of those whose length depends on values.
    frame: makes all other bytes of the file (header, padding, directory), by offset, up to its end.
    suffixes: the suffixes of its files; none for a container whose files are known by their whole names.
    single, shard, index: the names of a single file, of a shard, and of the shards' index; None if it has no index.
    """

    name: str
    read_specs: Callable[[PinnedFiles, str], tuple[WeightSpec, ...]]
    lay_out: LayOut
    place: Callable[[OutputFile, Mapping[str, int]], Places]
    frame: Callable[[OutputFile, Places, Checksum], list[tuple[int, bytes]]]
    suffixes: tuple[str, ...]
    single: str
    shard: str
    index: str | None

    def file_name(self, number: int, count: int) -> str:
        """Return the name of file `number`, from 1, of `count` files."""
        return self.single if count == 1 else self.shard.format(number=number, count=count)
