"""The error of a stored tensor: decode the stored bytes, compare them with the source's view, and add up.

This works for every scheme by its `decode` alone and shares no code with its encoder, so that a mistake in one does not
hide a mistake in the other. A plain copy is compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from loaders.dtypes import WEIGHT_DTYPES
from loaders.quantization.grid import Grid
from loaders.quantization.kernels import compare, cpu
from loaders.quantization.kernels.cpu import kernel_input
from loaders.quantization.scheme import Bounded, Compared, Gridded, RangeEncoder, Scheme, Stored, View, Work, fits
from loaders.quantization.schemes.plain import Plain
from loaders.specs import TensorSpec
from loaders.stats import ErrorSums

INNER = 1 << 18  # weights decoded at once, 1 MiB of float32: they stay in the cache until they are compared


def measure(
    view: View, scheme: Scheme, spec: TensorSpec, stored: Stored, work: Work, on_bytes: Callable[[int], None]
) -> ErrorSums:
    """Measure one tensor. An error2 of infinity says that a single weight came back wrong.

    `spec` is what the scheme encoded: the view's spec, or that of its cast. `on_bytes` is called with the source bytes
    of each range once it was compared.
    """
    comparison = Comparison(scheme, view.spec, spec, work)

    def compare_range(start: int, stop: int) -> np.ndarray:
        block = view.read(start, stop)
        sums = comparison.sums(block, stored, start, stop)
        on_bytes(block.nbytes)
        return sums

    return added(view.spec, work.sweep(view.spec.num_items, comparison.align, compare_range))


def added(source: TensorSpec, ranges: Iterable[np.ndarray]) -> ErrorSums:
    """Return the error of a tensor from the sums over its ranges, which are added in this order."""
    total = compare.new_sums()
    for sums in ranges:
        compare.merge(total, sums)
    return compare.error_sums(source.numel, total)


class Comparison:
    """The comparison of any range of a tensor with what was stored for it.

    `source` is the spec of the weights that are compared; `spec` is what the scheme encoded, which differs by a cast.
    `align` is the number of items at whose multiples ranges are cut.
    """

    def __init__(self, scheme: Scheme, source: TensorSpec, spec: TensorSpec, work: Work) -> None:
        self._scheme = scheme
        self._source = source
        self._spec = spec
        self._work = work
        self._compared = scheme if fits(scheme, Compared) else None
        self._gridded = scheme if fits(scheme, Gridded) else None
        self._bounded = scheme if fits(scheme, Bounded) else None
        self._is_copy = isinstance(scheme, Plain) and scheme.dtype in (None, source.dtype.name)
        align = scheme.align(spec)
        self._inner = -(-INNER // align) * align
        by_range = scheme.range_align(spec) if fits(scheme, RangeEncoder) else None
        self.align = by_range or align

    def sums(self, block: np.ndarray, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Return the sums of kernels/compare.py over items [start, stop). block: their raw weights (stop - start,)."""
        dtype, sums = self._source.dtype.name, compare.new_sums()
        if self._is_copy:
            _compare_copy(block, stored.read("weight", start, stop), dtype, sums, dtype in WEIGHT_DTYPES)
            return sums
        at_once = self._compared
        if at_once is None or not at_once.compare(self._spec, stored, start, stop, block, dtype, sums):
            self._decode_and_compare(block, stored, start, stop, sums)
        if self._bounded is not None and not sums[compare.NONFINITE]:
            _check_each(sums, self._bounded.greatest_error(self._spec, stored, start, stop))
        return sums

    def _decode_and_compare(self, block: np.ndarray, stored: Stored, start: int, stop: int, sums: np.ndarray) -> None:
        dtype = self._source.dtype.name
        for at in range(start, stop, self._inner):
            end = min(at + self._inner, stop)
            decoded = self._work.array("compared", end - at, np.float32)
            self._scheme.decode(self._spec, stored, at, end, decoded, self._work)
            part = block[at - start : end - start]
            cpu.compare_into(part, dtype, decoded, sums)
            # A NaN in the source may spoil the scale of its whole group, so bounds by scales say nothing there.
            if self._gridded is not None and not sums[compare.NONFINITE]:
                self._check_grid(part, decoded, self._gridded.grid(self._spec, stored, at, end), sums)

    def _check_grid(self, block: np.ndarray, decoded: np.ndarray, grid: Grid | None, sums: np.ndarray) -> None:
        """Make the error infinite if a weight is not the nearest that its stored scale allows: it was encoded wrong."""
        if grid is not None and self._source.dtype != self._spec.dtype:
            grid = grid.after_cast()
        if grid is not None and not grid.holds(kernel_input(block, self._source.dtype.name), decoded):
            sums[compare.WRONG] = 1


def _check_each(sums: np.ndarray, greatest: float) -> None:
    """Count the range as wrong if a weight is further off than the stored scales allow."""
    if sums[compare.MAX_ERROR] > greatest:
        sums[compare.WRONG] = 1


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare bits rather than values, so that NaN equals NaN and -0 differs from 0; by words, eight bytes at once."""
    if one.nbytes != other.nbytes:
        return False
    a, b, words = one.view(np.uint8), other.view(np.uint8), one.nbytes // 8 * 8
    same_words = a[:words].view(np.uint64) == b[:words].view(np.uint64)
    return bool(same_words.all()) and np.array_equal(a[words:], b[words:])


def _compare_copy(block: np.ndarray, copy: np.ndarray, dtype: str, sums: np.ndarray, is_number: bool) -> None:
    """Compare a copy, which is exact or wrong."""
    if not _same_bits(block, copy):
        sums[compare.WRONG] = 1
    elif is_number:
        cpu.scan_into(block, dtype, sums)
