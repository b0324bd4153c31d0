"""The sum of weights and a product of two narrow matrices, in float32 and in one fixed order.

Each entry of the product is a chain of fused multiply-adds over the rank, from its first to its last column. That is
what the matrix products of torch's CPU libraries compute for the ranks of adapters, so that the sums are the same bits
on every machine and, up to a rank of CHAIN, those of peft. Beyond it the libraries add up chains of equal length.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from loaders.quantization.kernels.lanes import F32, Array, Lanes, Value, kernel, vector

CHAIN = 192  # the longest chain of MKL's sgemm, measured with torch 2 on x86
ROWS = 16  # rows at a time: a tile of the right matrix stays in the cache for them, and the weights come in order
TILE = 64  # columns at a time, which stay in registers over the rank: four vectors of sixteen


@vector(types.void)
def chain(lanes: Lanes, left: Array, at: Value, first: Value, last: Value, right: Array, to: Value, out: Array) -> None:
    """Write sum(left[at + k] * right[to + k * TILE + j] for k in range(first, last)) to out[j], for each j of a tile.

    The arrays are float32 and flat.
    """
    kind = ir.VectorType(F32, 16)

    def body(k: Value, *sums: Value) -> list[Value]:
        weight = lanes.splat(lanes.b.load(left.pointer(lanes.b.add(at, k), F32)), 16)
        row = lanes.b.add(to, lanes.op("mul", k, TILE))
        entries = [lanes.load(right, lanes.op("add", row, 16 * i), 16) for i in range(TILE // 16)]
        return [lanes.call("llvm.fma.v16f32", kind, weight, x, s) for x, s in zip(entries, sums, strict=True)]

    sums = lanes.fold(first, last, 1, [lanes.const(kind, 0)] * (TILE // 16), body)
    for index, value in enumerate(sums):
        lanes.store(value, out, ir.Constant(at.type, 16 * index))


@kernel
def add_product(left, right, rows, columns, scaling, start, values):  # type: ignore[no-untyped-def]
    """Add scaling * (left @ right) to flat entries of a stack of matrices, in place.

    left (E * rows, rank) is float32, right is what `tiled` makes of (E, rank, columns); `values` are the entries from
    `start` on of (E, rows, columns).
    """
    tiles, rank, stop = right.shape[1], right.shape[2], start + values.size
    flat_left, flat_right = left.reshape(-1), right.reshape(-1)
    chains = (rank + CHAIN - 1) // CHAIN
    step = (rank + chains - 1) // chains
    total, part = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    last_row = (stop + columns - 1) // columns
    for block in range(start // columns, last_row, ROWS):
        for tile in range(tiles):
            edge = tile * TILE
            for row in range(block, min(block + ROWS, last_row)):
                low = max(edge, start - row * columns)
                high = min(edge + TILE, columns, stop - row * columns)
                if low >= high:
                    continue
                to = (row // rows * tiles + tile) * rank * TILE
                chain(flat_left, row * rank, 0, min(step, rank), flat_right, to, total)
                for first in range(step, rank, step):
                    chain(flat_left, row * rank, first, min(first + step, rank), flat_right, to, part)
                    for j in range(TILE):
                        total[j] += part[j]
                mine = values[row * columns + low - start : row * columns + high - start]
                for j in range(mine.size):
                    mine[j] += total[low - edge + j] * scaling


def tiled(right: np.ndarray) -> np.ndarray:
    """Return a stack (E, rank, C) of float32 as (E, tiles, rank, TILE), filled up with zeros.

    A tile lies in one piece: rows that begin a power of two apart, as those of whole matrices do, would push each other
    out of the cache.
    """
    matrices, rank, columns = right.shape
    tiles = -(-columns // TILE)
    made = np.zeros((matrices, rank, tiles * TILE), np.float32)
    made[..., :columns] = right
    return np.ascontiguousarray(made.reshape(matrices, rank, tiles, TILE).transpose(0, 2, 1, 3))
