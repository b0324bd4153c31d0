"""Boxes of a matrix, for decoders that work by rows and columns: flat ranges, and windows that step or transpose.

A box is where some rows meet some columns. Formats whose scales belong to rows and columns of a matrix decode boxes.
Callers ask for flat ranges; these are cut into boxes here, once for all such formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from loaders.dtypes import Shape
from loaders.quantization.scheme import BoxDecoder, Decoder, Stored, Work
from loaders.specs import TensorSpec

# The most weights in a box, 4 MiB of float32. Larger boxes need fewer calls, and more memory in every thread.
BOX = 1 << 20


class ByBoxes:
    """The flat `decode` of a `BoxDecoder`, by its `decode_box`."""

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
    """Cut a flat range into boxes, in order: the end of a row, runs of whole rows of at most BOX, part of a row."""
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
    """Return the number of matrices in a shape (..., R, C), R and C. A vector counts as one row."""
    rows = shape[-2] if len(shape) > 1 else 1
    return math.prod(shape[:-2]), rows, shape[-1]


def read_rows(stored: Stored, role: str, rows: range, width: int) -> np.ndarray:
    """Read rows of a role's row-major items as (len(rows), width).

    With a step, the rows in between are read too and dropped: one long read costs less than many short ones.
    """
    block = stored.read(role, rows[0] * width, (rows[-1] + 1) * width)
    return block.reshape(-1, width)[:: rows.step]


def decode_rows(
    decoder: Decoder, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
) -> None:
    """Decode a box by any decoder. One that is no `BoxDecoder` decodes whole spans of rows, a few rows at a time."""
    width = spec.shape[-1]
    many = max(1, 4 * BOX // (width * rows.step))  # a span takes at most 16 MiB, unless a single row is longer
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
    """Decode part of a window into a tensor: out.size flat items of the window from item `start` on.

    The window has `shape`, begins at flat item `offset` of the whole tensor (spec `whole`), and steps by `stride` items
    in each dimension. Mostly its last two dimensions are rows and columns of the whole, or columns and rows (a
    transpose), and only what it has of them is decoded.
    """
    width = whole.shape[-1]
    if not _is_of_rows(shape, stride, width):
        _decode_spans(decoder, whole, stored, shape, offset, stride, start, out, work)
        return
    high, wide = shape[-2:]
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


def _is_of_rows(shape: Shape, stride: Shape, width: int) -> bool:
    """Whether a window's last two dimensions are rows and columns of the whole tensor, in either order."""
    if len(shape) < 2:
        return False
    (rows, columns), (by_row, by_column) = shape[-2:], stride[-2:]
    is_plain = by_column == 1 and (by_row % width == 0 or rows == 1)
    is_turned = by_row == 1 and (by_column % width == 0 or columns == 1)
    return is_plain or is_turned


def _decode_spans(
    decoder: Decoder, whole: TensorSpec, stored: Stored, shape: Shape, offset: int, stride: Shape, start: int,
    out: np.ndarray, work: Work,
) -> None:  # fmt: skip
    """Decode part of any window: the whole rows that some entries of its first dimension are from, then its items."""
    width, inner = whole.shape[-1], math.prod(shape[1:])
    reach = sum((size - 1) * step for size, step in zip(shape[1:], stride[1:], strict=True)) + 1
    many = max(1, BOX // max(reach, stride[0]))
    stop = start + out.size
    for entry in range(start // inner, -(-stop // inner), many):
        count = min(many, -(-stop // inner) - entry)
        top, left = divmod(offset + entry * stride[0], width)
        bottom = (offset + (entry + count - 1) * stride[0] + reach - 1) // width
        rows = work.array("spans", (bottom + 1 - top) * width, np.float32).reshape(-1, width)
        decode_rows(decoder, whole, stored, range(top, bottom + 1), range(width), rows, work)
        items = np.lib.stride_tricks.as_strided(
            rows.reshape(-1)[left:], (count, *shape[1:]), tuple(step * rows.itemsize for step in stride),
            writeable=False,
        )  # fmt: skip
        first, last = max(start, entry * inner), min(stop, (entry + count) * inner)
        out[first - start : last - start] = items.reshape(-1)[first - entry * inner : last - entry * inner]
