"""Codes of distant weights that share an item: flat weights are cut into runs, an item holds the same place of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from loaders.quantization.scheme import Stored


@dataclass(frozen=True, slots=True)
class PackedRuns:
    """The shape of a weight's packed matrix: its groups, the rows of W_q, and its columns."""

    groups: int
    packed_rows: int
    columns: int

    @property
    def run(self) -> int:
        """The number of values in a run, which is that of items in W_q."""
        return self.packed_rows * self.columns


def codes_by_chunks(
    stored: Stored, role: str, run: int, shifts: Sequence[int], start: int, stop: int
) -> Iterator[tuple[int, int, np.ndarray, int]]:
    """Yield the codes of weights [start, stop) piece by piece: its start and stop, the items, and the bit of its codes.

    `shifts` are the bits from which on the codes of each run of `run` weights lie. Pieces are whole chunks of
    kernels/compare.py, counted from `start`, but for the last one, so that they have the sums of the whole range. A
    chunk in which runs end is a piece whose codes are put together.
    """
    from loaders.quantization.kernels.compare import CHUNK
    from loaders.quantization.kernels.cpu import kernel_input

    def read(at: int, end: int) -> np.ndarray:
        return stored.read(role, at % run, at % run + end - at)

    while start < stop:
        of_run = min(stop, (start // run + 1) * run)
        end = stop if of_run == stop else start + (of_run - start) // CHUNK * CHUNK
        if end > start:
            codes, shift = read(start, end), shifts[start // run]
        else:
            end = min(start + CHUNK, stop)
            cuts = [start, *range(of_run, end, run), end]
            codes, shift = np.concatenate([read(*part) >> shifts[part[0] // run] for part in pairwise(cuts)]), 0
        yield start, end, kernel_input(codes, ""), shift
        start = end
