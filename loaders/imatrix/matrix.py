"""An importance matrix of llama.cpp: for each tensor of a model, how much each of its input channels counts.

It holds sums of squares of a linear layer's inputs, by channel, and of a stack of experts by expert, with the number of
tokens (or calls) that they were taken over. A driver reads names, counts and places of a file, and checks its numbers;
a worker reads the numbers of the tensors that it encodes.

Source: llama.cpp, common/imatrix-loader.cpp, and load_imatrix in tools/quantize/quantize.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from loaders.containers.gguf import MetadataValue, text, uint32
from loaders.errors import BadSpec
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import Entry

SHOWN_BYTES = 127  # of a text that llama-quantize writes: those of llama_model_kv_override
KEPT = 8  # tensors whose numbers a process holds: the experts of a layer are parts of a few


@dataclass(frozen=True, slots=True)
class MatrixFile:
    """One version of an importance matrix's file, and the xxh3-128 of its bytes."""

    # The address is no part of what the file is, so that a moved matrix is the same one.
    address: Address = field(repr=False, compare=False)  # of its folder
    entry: Entry
    digest: str


@dataclass(frozen=True, slots=True)
class Sums:
    """The sums of one tensor: the byte at which they begin, how many float32 they are, and the counts to divide by.

    Of several counts each is of as many sums; there is one for each expert. With a count of 0, which a file of the old
    form does not have, nothing was seen: llama.cpp takes 1 for all of these channels.
    """

    offset: int
    numbers: int
    counts: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorImportance:
    """Where the importances of one tensor lie: `sums`, of which those of `matrices` from `first` on are the tensor's.

    A matrix has `columns` input channels; a tensor that is a stack of experts has several matrices.
    """

    file: MatrixFile
    sums: Sums
    first: int
    matrices: int
    columns: int

    def read(self) -> np.ndarray:
        """Return the importances, float32 (matrices, columns).

        Raises:
            As `Store.read` and `Store.check_unchanged`.
        """
        found = _importances(self.file, self.file.address, self.sums)
        return found.reshape(-1, self.columns)[self.first : self.first + self.matrices]


@lru_cache(maxsize=KEPT)
def _importances(file: MatrixFile, folder: Address, sums: Sums) -> np.ndarray:
    store = open_store(folder)
    raw = store.read(file.entry, sums.offset, sums.offset + 4 * sums.numbers)
    store.check_unchanged(file.entry)
    found = np.frombuffer(raw, "<f4").reshape(len(sums.counts), -1)
    counts = np.array(sums.counts, np.float32)[:, None]
    made = np.ones(found.shape, np.float32)
    np.divide(found, counts, out=made, where=counts > 0)
    return made.reshape(-1)


@dataclass(frozen=True, kw_only=True)
class ImportanceMatrix:
    """An importance matrix: the sums by the tensors' names in a GGUF, and what it says about how it was made."""

    file: MatrixFile
    sums: Mapping[str, Sums]
    datasets: tuple[str, ...] = ()
    chunks: int = 0  # of text, that it was made over; 0 where the file does not say

    def of(self, name: str, columns: int, matrices: int, first: int = 0, count: int | None = None) -> TensorImportance:
        """Return the importances of `count` (None: all) of the `matrices` of a tensor, from the matrix `first` on.

        Raises:
            BadSpec: the model's tensor has another size.
        """
        sums = self.sums[name]
        if sums.numbers != columns * matrices or sums.numbers // len(sums.counts) % columns:
            wanted = f"{columns} input channels" + (f" for each of {matrices} matrices" if matrices > 1 else "")
            by = f", counted in {len(sums.counts)} parts" if len(sums.counts) > 1 else ""
            raise BadSpec(
                f"{self.file.entry.name}: {name} has {sums.numbers} numbers{by}; the model's has {wanted}: is this the"
                " importance matrix of another model?"
            )
        return TensorImportance(
            file=self.file, sums=sums, first=first, matrices=matrices if count is None else count, columns=columns
        )

    def unseen(self, name: str) -> tuple[int, ...]:
        """Return the experts of a tensor, or other parts with a count of their own, that no token went through."""
        return tuple(index for index, count in enumerate(self.sums[name].counts) if count == 0)

    @property
    def metadata(self) -> dict[str, MetadataValue]:
        """What llama-quantize writes into a GGUF about the matrix by which it was quantized."""
        found = {"quantize.imatrix.file": _shown(self.file.entry.name)}
        if self.datasets:
            found["quantize.imatrix.dataset"] = _shown(self.datasets[0])
        found["quantize.imatrix.entries_count"] = uint32(len(self.sums))
        if self.chunks > 0:
            found["quantize.imatrix.chunks_count"] = uint32(self.chunks)
        return found


def _shown(value: str) -> MetadataValue:
    return text(value.encode(errors="replace")[:SHOWN_BYTES].decode(errors="ignore"))
