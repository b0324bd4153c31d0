"""Encoding by an importance matrix: ranges of a tensor's raw weights, with the importances of its input channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loaders.dtypes import DTYPES
from loaders.quantization.kernels.cpu import kernel_input
from loaders.quantization.kernels.ggml import iq4, weighted_blocks, weighted_k_quants
from loaders.quantization.kernels.ggml.k_quants import to_floats
from loaders.quantization.kernels.lanes import kernel

SOME = 1 << 16  # weights that are widened to float32 at once: with their importances they stay in the cache
# Weights, float32, and their importances into blocks
SEARCHED: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], None]] = {
    "Q2_K": weighted_k_quants.encode_q2_k, "Q3_K": weighted_k_quants.encode_q3_k, "Q4_K": weighted_k_quants.encode_q4_k,
    "Q5_K": weighted_k_quants.encode_q5_k, "Q6_K": weighted_k_quants.encode_q6_k,
    "IQ4_NL": iq4.encode_iq4_nl, "IQ4_XS": iq4.encode_iq4_xs,
}  # fmt: skip
# Whether a block has a minimum, and whether its codes have five bits.
BLOCKS = {"Q4_0": (False, False), "Q4_1": (True, False), "Q5_0": (False, True), "Q5_1": (True, True)}


@kernel
def _importances(importance, start, rows, found):  # type: ignore[no-untyped-def]
    """Give each weight of a range the importance of its input channel."""
    columns, at = importance.shape[1], 0
    row, column = start // columns, start % columns
    while at < found.size:
        count = min(columns - column, found.size - at)
        found[at : at + count] = importance[row // rows, column : column + count]
        at, row, column = at + count, row + 1, 0


def encode_weighted(
    x: np.ndarray, dtype: str, kind: str, start: int, rows: int, importance: np.ndarray, out: np.ndarray
) -> None:
    """Encode the weights of a tensor from flat item `start` on as blocks of the type `kind`.

    kind: one of schemes.ggml.WEIGHTED. x: raw weights (n,), whole blocks, of types that weigh by row whole rows.
    importance: float32 (matrices, columns), where a matrix has `rows` rows. out: uint8, the blocks.
    """
    x, part = kernel_input(x, dtype), SOME
    values, found = np.empty(min(x.size, part), np.float32), np.empty(min(x.size, part), np.float32)
    squares = np.empty(0, np.float32)
    columns, size = importance.shape[1], DTYPES[kind].size
    if kind in BLOCKS:
        squares = _row_squares(x, columns)
    for at in range(0, x.size, part):
        some = x[at : at + part]
        to_floats(some, values)
        mine, weights = values[: some.size], found[: some.size]
        _importances(importance, start + at, rows, weights)
        blocks = out[size((at,)) : size((at + some.size,))]
        if kind in BLOCKS:
            weighted_blocks.encode(mine, weights, squares, at, columns, *BLOCKS[kind], blocks)
        else:
            SEARCHED[kind](mine, weights, blocks)


def _row_squares(x: np.ndarray, columns: int) -> np.ndarray:
    """Return the mean square of each row, float32; some rows at once are widened."""
    squares = np.empty(x.size // columns, np.float32)
    some = max(1, SOME // columns)
    values = np.empty(min(some, squares.size) * columns, np.float32)
    for row in range(0, squares.size, some):
        part = x[row * columns : (row + some) * columns]
        to_floats(part, values)
        weighted_k_quants.mean_squares(values[: part.size], columns, np.float32(1), squares[row : row + some])
    return squares
