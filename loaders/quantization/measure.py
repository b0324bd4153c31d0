"""The error of a stored tensor: decode the stored bytes, compare them with the source's view, and add up.

This works for every scheme by its `decode` alone and shares no code with its encoder, so that a mistake in one does not
hide a mistake in the other. A plain copy is compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loaders.dtypes import WEIGHT_DTYPES
from loaders.quantization.grid import Grid
from loaders.quantization.kernels import compare, cpu
from loaders.quantization.kernels.cpu import kernel_input
from loaders.quantization.scheme import Bounded, Comparing, Gridded, Scheme, Stored, View, Work
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
    is_number = view.spec.dtype.name in WEIGHT_DTYPES
    align = scheme.align(spec)
    gridded = scheme if isinstance(scheme, Gridded) else None
    bounded = scheme if isinstance(scheme, Bounded) else None
    comparing = scheme if isinstance(scheme, Comparing) else None
    inner = -(-INNER // align) * align

    def compare_range(start: int, stop: int) -> np.ndarray:
        sums = compare.new_sums()
        block = view.read(start, stop)
        if isinstance(scheme, Plain) and scheme.dtype in (None, view.spec.dtype.name):
            _compare_copy(block, stored.read("weight", start, stop), view.spec.dtype.name, sums, is_number)
        elif comparing is None or not comparing.compare(spec, stored, start, stop, block, view.spec.dtype.name, sums):
            for at in range(start, stop, inner):
                end = min(at + inner, stop)
                decoded = work.array("decoded", end - at, np.float32)
                scheme.decode(spec, stored, at, end, decoded, work)
                part = block[at - start : end - start]
                cpu.compare_into(part, view.spec.dtype.name, decoded, sums)
                # A NaN in the source may spoil the scale of its whole group, so bounds by scales say nothing there.
                if gridded is not None and not sums[compare.NONFINITE]:
                    _check_grid(part, decoded, gridded.grid(spec, stored, at, end), view.spec, spec, sums)
        if bounded is not None and not sums[compare.NONFINITE]:
            _check_each(sums, bounded.greatest_error(spec, stored, start, stop))
        on_bytes(block.nbytes)
        return sums

    total = compare.new_sums()
    for sums in work.sweep(view.spec.num_items, align, compare_range):
        compare.merge(total, sums)
    return compare.error_sums(view.spec.numel, total)


def _check_each(sums: np.ndarray, greatest: float) -> None:
    """Count the range as wrong if a weight is further off than the stored scales allow."""
    if sums[compare.MAX_ERROR] > greatest:
        sums[compare.WRONG] = 1


def _check_grid(
    block: np.ndarray, decoded: np.ndarray, grid: Grid | None, source: TensorSpec, spec: TensorSpec, sums: np.ndarray
) -> None:
    """Make the error infinite if a weight is not the nearest that its stored scale allows: it was encoded wrong."""
    if grid is not None and source.dtype != spec.dtype:
        grid = grid.after_cast()
    if grid is not None and not grid.holds(kernel_input(block, source.dtype.name), decoded):
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
