"""Windows into what a decoder decodes: rows and columns, transposes, and any other strides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import ThreadedWork
from loaders.dtypes import DTYPES, Shape
from loaders.quantization.boxes import decode_window
from loaders.specs import TensorSpec

pytestmark = pytest.mark.quick
ROWS, COLUMNS = 24, 40
WHOLE = np.arange(ROWS * COLUMNS, dtype=np.float32)


class Counting:
    """A decoder of a matrix whose weights are their own places, in blocks of eight."""

    def align(self, spec: TensorSpec) -> int:
        return 8

    def decode(self, spec: TensorSpec, stored: Any, start: int, stop: int, out: np.ndarray, work: Any) -> None:
        assert start % 8 == 0
        out[:] = WHOLE[start:stop]


MATRIX = WHOLE.reshape(ROWS, COLUMNS)
WINDOWS = {
    "rows": MATRIX[3:9], "columns": MATRIX[:, 8:24], "every second row": MATRIX[1::2], "a transpose": MATRIX.T,
    "a transposed part": MATRIX[4:12, 6:30].T,
    "heads of columns in another order": MATRIX.reshape(ROWS, 2, 4, 5).swapaxes(1, 2),
    "heads of rows in another order": MATRIX.reshape(2, 3, 4, COLUMNS).swapaxes(0, 1),
    "every third column": MATRIX[:, ::3],
    "a part of each head of rows": MATRIX.reshape(4, 6, COLUMNS)[:, 2:5],
    "a vector": WHOLE[17:55],
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_decoded_item_by_item(name: str, work: ThreadedWork) -> None:
    window = WINDOWS[name]
    offset = (window.__array_interface__["data"][0] - WHOLE.__array_interface__["data"][0]) // 4
    shape: Shape = window.shape
    stride = tuple(step // 4 for step in window.strides)
    wanted, size = window.reshape(-1), window.size
    spec = TensorSpec("whole", DTYPES["F32"], (ROWS, COLUMNS))
    for start, stop in ((0, size), (1, size), (size // 3, size // 3 + 7), (size - 1, size)):
        found = np.full(stop - start, np.nan, np.float32)
        decode_window(Counting(), spec, None, shape, offset, stride, start, found, work)  # type: ignore[arg-type]
        assert np.array_equal(found, wanted[start:stop]), (start, stop)
