"""The CPU's kernels: numba over LLVM vectors. They release the interpreter's lock, so that threads run side by side."""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels import bitnet, casts, compare
from loaders.quantization.kernels.bitsandbytes import fourbit, tables


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
    """The encoders of `Kernels` on the CPU. Those of each scheme are imported at their first use."""

    def encode_fourbit(
        self, x: np.ndarray, dtype: str, table: str, group: int, packed: np.ndarray, absmax: np.ndarray
    ) -> None:
        code, is_fp4 = tables.table(table), table == "fp4"
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

    def encode_int8(self, x: np.ndarray, dtype: str, columns: int, codes: np.ndarray, absmax: np.ndarray) -> None:
        from loaders.quantization.kernels.bitsandbytes import int8

        int8.encode_int8(kernel_input(x, dtype), columns, codes, absmax)

    def encode_packed(
        self, x: np.ndarray, dtype: str, group: int, bits: int, eps: np.float32, packed: np.ndarray, scales: np.ndarray
    ) -> None:
        from loaders.quantization.kernels.compressed_tensors import packed_int

        packed_int.encode(kernel_input(x, dtype), group, bits, eps, packed, scales)

    def encode_packed_zero(
        self, x: np.ndarray, dtype: str, group: int, eps: np.float32, packed: np.ndarray, scales: np.ndarray,
        zeros: np.ndarray,
    ) -> None:  # fmt: skip
        from loaders.quantization.kernels.compressed_tensors import packed_int

        packed_int.encode_zero(kernel_input(x, dtype), group, eps, packed, scales, zeros)

    def encode_scaled_rows(
        self, x: np.ndarray, dtype: str, kind: str, columns: int, eps: np.float32, codes: np.ndarray, scales: np.ndarray
    ) -> None:
        from loaders.quantization.kernels.compressed_tensors import fp8, int8

        encode = fp8.encode_rows if kind == "float" else int8.encode_rows
        encode(kernel_input(x, dtype), columns, eps, codes, scales)

    def encode_affine(
        self, x: np.ndarray, dtype: str, bits: int, group: int, packed: np.ndarray, scales: np.ndarray,
        biases: np.ndarray,
    ) -> None:  # fmt: skip
        from loaders.quantization.kernels.mlx import affine

        affine.encode(kernel_input(x, dtype), bits, group, packed, scales, biases)

    def encode_blocks(self, x: np.ndarray, dtype: str, kind: str, out: np.ndarray) -> None:
        from loaders.quantization.kernels.ggml.encode import ENCODERS

        ENCODERS[kind](kernel_input(x, dtype), out)

    def solve_hqq(
        self, x: np.ndarray, dtype: str, strides: tuple[int, int], size: int, top: int, rounds: bool, tile: int,
        found: tuple[np.ndarray, np.ndarray, np.ndarray], errors: np.ndarray,
    ) -> None:  # fmt: skip
        from loaders.quantization.kernels.hqq import solver

        solver.solve(kernel_input(x, dtype), *strides, size, np.float32(top), rounds, tile, *found, errors)

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
