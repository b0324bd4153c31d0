"""Codes with a scale a row compared with their weights, chunk by chunk: what int8.py and fp8.py have in common."""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.compare import CHUNK, add_pairs, settle, tile_size
from loaders.quantization.kernels.lanes import inlined
from loaders.quantization.kernels.rounding import STEP


@inlined
def compare_rows(x, codes, columns, scales, sums, has_nan, add, decode_rows):  # type: ignore[no-untyped-def]
    """Add the differences of whole rows of raw weights and of what `decode_rows` makes of the rest to `sums`.

    `add` sums those of groups of a multiple of STEP, none of whose codes is a NaN.
    """
    step = tile_size(columns)
    tile, totals = np.empty(CHUNK, np.float32), np.zeros(3, np.float64)
    for row in range(0, x.size, step):
        last = min(row + step, x.size)
        own = scales[row // columns : last // columns]
        for start in range(row, last, CHUNK):
            stop = min(start + CHUNK, last)
            some, some_codes, group = x[start:stop], codes[start:stop], min(columns, stop - start)
            is_plain = group % STEP == 0 and not has_nan(codes, start, stop)
            if not is_plain or not settle(add(some, some_codes, group, own, 0, some.size, totals), totals, sums):
                decode_rows(some_codes, group, own, tile)
                add_pairs(some, tile[: some.size], totals, sums)
