"""What every container offers, and what a layout may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loaders.specs import OutputFile, StoredTensor, WeightSpec

Places = Mapping[str, tuple[int, int]]  # a tensor's first byte in its file, and how many it has
Checksum = Callable[[int, int], int]  # CRC-32 of bytes [offset, offset + size) of the file


class LayOut(Protocol):
    def __call__(self, file: str, tensors: list[StoredTensor], about: Any = None) -> OutputFile:
        """Give every tensor its place. `about`: what the file says beside its tensors, from the layout.

        Raises:
            BadSpec: the container cannot hold one of them.
        """
        ...


@dataclass(frozen=True)
class Container:
    """A kind of weight files: how it is read, laid out and framed, and what its files are called.

    place: where the tensors lie at last, given the lengths of those whose length depends on values.
    frame: all other bytes of the file, by offset, to its end.
    """

    name: str
    read_specs: Callable[[Path, str], tuple[WeightSpec, ...]]
    lay_out: LayOut
    place: Callable[[OutputFile, Mapping[str, int]], Places]
    frame: Callable[[OutputFile, Places, Checksum], list[tuple[int, bytes]]]
    single: str
    shard: str
    index: str

    def file_name(self, number: int, count: int) -> str:
        """The name of file `number` (from 1) of so many."""
        return self.single if count == 1 else self.shard.format(number=number, count=count)
