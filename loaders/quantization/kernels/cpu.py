"""The CPU's kernels: numba over LLVM vectors. They release the interpreter's lock, so that threads run side by side."""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels import bitnet, casts, compare
from loaders.quantization.kernels.bitsandbytes import fourbit


def kernel_input(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return raw weights as the kernels take them: aligned, read-only, float16 as int16 bits, float64 as float32.

    Views into a mapped file may begin at any byte, and are read-only; other weights lie in arrays of ours. numba would
    compile every kernel anew for unaligned arrays, which are copied, and for each mixture of arrays that may and that
    may not be written.
    """
    x = x if x.flags.aligned else x.copy()
    x = casts.to_float32(x, dtype) if dtype == "F64" else x.view(np.int16 if dtype == "F16" else x.dtype)
    x.flags.writeable = False
    return x


class CpuKernels:
    """The encoders of `Kernels` on the CPU."""

    def encode_fourbit(
        self, x: np.ndarray, dtype: str, table: str, group: int, packed: np.ndarray, absmax: np.ndarray
    ) -> None:
        code, is_fp4 = fourbit.table(table), table == "fp4"
        x = kernel_input(x, dtype)
        if dtype == "BF16" and group % fourbit.WIDE == 0:
            fourbit.encode_bf16(
                x, group, code.bounds, is_fp4, code.rows, code.directions, code.lowest, code.highest, packed, absmax
            )
        else:
            fourbit.encode(x, group, code.bounds, is_fp4, packed, absmax)

    def group_absmax(self, x: np.ndarray, dtype: str, group: int, absmax: np.ndarray) -> None:
        fourbit.group_absmax(kernel_input(x, dtype), group, absmax)

    def magnitude_sums(self, x: np.ndarray, dtype: str) -> np.ndarray:
        sums = np.empty(-(-x.size // bitnet.SUMMED), np.float64)
        bitnet.magnitude_sums(kernel_input(x, dtype), sums)
        return sums

    def pack_ternary(
        self, runs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], dtype: str, inverse: float, out: np.ndarray
    ) -> None:
        taken = "F32" if dtype == "F64" else dtype
        limit, bound = bitnet.zero_limit(taken, np.float32(inverse))
        a, b, c, d = (kernel_input(run, dtype) for run in runs)
        bitnet.pack(a, b, c, d, limit, bound, out)


def compare_into(x: np.ndarray, dtype: str, decoded: np.ndarray, sums: np.ndarray) -> None:
    """Add the differences between raw weights and decoded float32 values to `sums` (see kernels/compare.py)."""
    compare.compare(kernel_input(x, dtype), decoded, sums)


def scan_into(x: np.ndarray, dtype: str, sums: np.ndarray) -> None:
    """Add the squares and the NaN and infinities of an exact copy to `sums`."""
    compare.scan(kernel_input(x, dtype), sums)
