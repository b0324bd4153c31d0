"""Decoders that work by rows and columns: flat ranges of them, and windows that step over rows or transpose.

A box is where some rows meet some columns. Formats whose scales belong to rows and columns of a matrix decode boxes;
what is asked for as a flat range is cut into boxes here, once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from loaders.dtypes import Shape
from loaders.quantization.scheme import BoxDecoder, Decoder, Stored, Work
from loaders.specs import TensorSpec

BOX = 1 << 20  # weights of a box at most: 4 MiB of float32


class ByBoxes:
    """The flat half of a `BoxDecoder`."""

    __slots__ = ()

    def align(self, spec: TensorSpec) -> int:
        return 1

    def decode(
        self: BoxDecoder, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work
    ) -> None:
        width = spec.shape[-1]
        for rows, columns in flat_boxes(start, stop, width):
            at = rows.start * width + columns.start - start
            box = out[at : at + len(rows) * len(columns)].reshape(len(rows), len(columns))
            self.decode_box(spec, stored, rows, columns, box, work)


def flat_boxes(start: int, stop: int, width: int) -> Iterator[tuple[range, range]]:
    """The boxes of a flat range, in its order: the end of a row, whole rows in runs of at most BOX, part of a row."""
    at = start
    while at < stop:
        row, column = divmod(at, width)
        if column or stop - at < width:
            end = min(width, column + stop - at)
            yield range(row, row + 1), range(column, end)
            at += end - column
            continue
        rows = min((stop - at) // width, max(1, BOX // width))
        yield range(row, row + rows), range(width)
        at += rows * width


def matrices(shape: Shape) -> tuple[int, int, int]:
    """How many matrices a shape (..., R, C) has, R and C; one row for a vector."""
    rows = shape[-2] if len(shape) > 1 else 1
    return math.prod(shape[:-2]), rows, shape[-1]


def read_rows(stored: Stored, role: str, rows: range, width: int) -> np.ndarray:
    """Rows of a role's row-major items, (len(rows), width). A step is read over: a run of rows lies together."""
    block = stored.read(role, rows[0] * width, (rows[-1] + 1) * width)
    return block.reshape(-1, width)[:: rows.step]


def decode_rows(
    decoder: Decoder, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
) -> None:
    """A box by any decoder; one that is no `BoxDecoder` decodes all of the rows' span, a few at a time."""
    width = spec.shape[-1]
    many = max(1, 4 * BOX // (width * rows.step))
    for at in range(0, len(rows), many):
        some, part = rows[at : at + many], out[at : at + many]
        if isinstance(decoder, BoxDecoder):
            box = part if part.flags.c_contiguous else work.array("box", part.size, np.float32).reshape(part.shape)
            decoder.decode_box(spec, stored, some, columns, box, work)
            if box is not part:
                part[...] = box
            continue
        align = decoder.align(spec)
        first, last = some[0] * width // align * align, (some[-1] + 1) * width
        span = work.array("span", min(-(-last // align) * align, spec.numel) - first, np.float32)
        decoder.decode(spec, stored, first, first + span.size, span, work)
        whole = span[some[0] * width - first : last - first].reshape(-1, width)
        part[...] = whole[:: some.step, columns.start : columns.stop]


def decode_window(
    decoder: Decoder, whole: TensorSpec, stored: Stored, shape: Shape, offset: int, stride: Shape, start: int,
    out: np.ndarray, work: Work,
) -> None:  # fmt: skip
    """The values of a window of a decoded tensor: flat items of the window's `shape` from `start` on, into out.

    A window's last two dimensions are rows and columns of the whole, or columns and rows.
    """
    width, (high, wide) = whole.shape[-1], shape[-2:]
    outer = tuple(math.prod(shape[i + 1 : -2]) for i in range(len(shape) - 2))
    for rows, columns in flat_boxes(start, start + out.size, wide):
        at = rows.start * wide + columns.start - start
        box = out[at : at + len(rows) * len(columns)].reshape(len(rows), len(columns))
        for first in range(rows.start // high * high, rows.stop, high):  # a matrix at a time
            mine = range(max(first, rows.start) - first, min(first + high, rows.stop) - first)
            part = box[mine.start + first - rows.start :][: len(mine)]
            rest, base = first // high, offset
            for n, s in zip(outer, stride, strict=False):
                base, rest = base + rest // n * s, rest % n
            top, left = divmod(base, width)
            if stride[-1] == 1:
                step = max(1, stride[-2] // width)
                taken = range(top + mine.start * step, top + (mine.stop - 1) * step + 1, step)
                across = range(left + columns.start, left + columns.stop)
                decode_rows(decoder, whole, stored, taken, across, part, work)
            else:
                step = max(1, stride[-1] // width)
                taken = range(top + columns.start * step, top + (columns.stop - 1) * step + 1, step)
                across = range(left + mine.start, left + mine.stop)
                decode_rows(decoder, whole, stored, taken, across, part.T, work)
