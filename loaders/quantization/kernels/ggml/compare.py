"""Blocks of ggml's types compared with the weights that they were made of, in one call a range.

A tile is decoded into the CPU's first cache and compared there: decoded weights that go to memory and back take longer
than both together. data: uint8, whole blocks; x: their raw weights; sums: those of kernels/compare.py, the same as by
way of a whole decoded range, since a tile is one of its chunks.

There is a kernel for each type, all but alike, since one that branched would compile the decoders of all types for a
job of one; and numba keeps no kernel on the disk that a function makes.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.compare import CHUNK, compare
from loaders.quantization.kernels.ggml import decode
from loaders.quantization.kernels.intrinsics import aligned_floats
from loaders.quantization.kernels.lanes import kernel

N = 32  # weights in a block; a chunk holds whole blocks


@kernel
def _q8_0(data, x, sums):  # type: ignore[no-untyped-def]
    tile = aligned_floats(CHUNK)
    for start in range(0, x.size, CHUNK):
        decoded = tile[: min(CHUNK, x.size - start)]
        decode.q8_0(data[start // N * 34 :], decoded)
        compare(x[start : start + decoded.size], decoded, sums)


@kernel
def _q4_0(data, x, sums):  # type: ignore[no-untyped-def]
    tile = aligned_floats(CHUNK)
    for start in range(0, x.size, CHUNK):
        decoded = tile[: min(CHUNK, x.size - start)]
        decode.q4_0(data[start // N * 18 :], decoded)
        compare(x[start : start + decoded.size], decoded, sums)


@kernel
def _q4_1(data, x, sums):  # type: ignore[no-untyped-def]
    tile = aligned_floats(CHUNK)
    for start in range(0, x.size, CHUNK):
        decoded = tile[: min(CHUNK, x.size - start)]
        decode.q4_1(data[start // N * 20 :], decoded)
        compare(x[start : start + decoded.size], decoded, sums)


@kernel
def _q5_0(data, x, sums):  # type: ignore[no-untyped-def]
    tile = aligned_floats(CHUNK)
    for start in range(0, x.size, CHUNK):
        decoded = tile[: min(CHUNK, x.size - start)]
        decode.q5_0(data[start // N * 22 :], decoded)
        compare(x[start : start + decoded.size], decoded, sums)


@kernel
def _q5_1(data, x, sums):  # type: ignore[no-untyped-def]
    tile = aligned_floats(CHUNK)
    for start in range(0, x.size, CHUNK):
        decoded = tile[: min(CHUNK, x.size - start)]
        decode.q5_1(data[start // N * 24 :], decoded)
        compare(x[start : start + decoded.size], decoded, sums)


COMPARERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1}
assert np.gcd(CHUNK, N) == N
