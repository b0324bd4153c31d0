"""The kernels in torch, for CUDA and MPS: blocks go to the device, codes come back.

The arithmetic is that of the CPU kernels, operation by operation in float32, so the bytes are the same wherever the
device rounds a float32 product and quotient correctly and keeps subnormal numbers. CUDA does. MPS flushes subnormals,
so groups whose weights are all below 1e-38 may differ there, and has no float64: sums for `ternary` are then taken on
the CPU. What a range of weights became is decoded and compared on the device, too, but on MPS; what is measured later,
after several sweeps, is on the CPU. Encoders that are not here are the CPU's.

HQQ's solver and the K-quants' searches may find other codes there, of the same error, so that the caller chooses where
they run (`loaders.backends.encoded_on`). On CUDA with Triton they are one kernel each (device/triton_search).

The tests run these kernels on torch's own CPU device, and on a GPU where there is one (pytest -m gpu). On an H100 the
bytes of NF4, FP4 and ternary were those of the CPU; the other schemes, comparing, the searches, page-locked buffers and
streams (device/transfers) have not been run on a GPU yet, and nothing has on MPS. Triton's kernels were run by its
interpreter, where the K-quants' bytes are the CPU's, and compiled for an H100.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from loaders.errors import BadSpec
from loaders.quantization.grid import Grid
from loaders.quantization.kernels import Decoder, bitnet, casts
from loaders.quantization.kernels import compare as sums_of
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.quantization.kernels.device import affine, compare, ggml, hqq, k_quants, rows_and_groups
from loaders.quantization.kernels.device.arithmetic import tops
from loaders.quantization.kernels.device.decode import floats
from loaders.quantization.kernels.device.fourbit import fourbit_codes
from loaders.quantization.kernels.device.transfers import DTYPES, Transfers, check_sums, count_of_sums, word_sums
from loaders.quantization.kernels.ggml.blocks import N as BLOCK

Tensors = Sequence[torch.Tensor]


class DeviceKernels(CpuKernels):
    """The encoders of `Kernels` in torch, on one device."""

    def __init__(self, device: str) -> None:
        is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if not is_there[device.partition(":")[0]]:
            raise BadSpec(f"backend={device}: torch {torch.__version__} finds no such device here; use backend=cpu")
        self._device = torch.device(device)
        self._transfers = Transfers(self._device)

    def encode_fourbit(
        self, x: np.ndarray, dtype: str, table: str, group: int, packed: np.ndarray, absmax: np.ndarray
    ) -> None:
        array, kind = self._sendable(x, dtype)

        def code(raws: Tensors) -> Tensors:
            return fourbit_codes(raws[0].view(DTYPES[kind]).reshape(-1, group), table)

        self._transfers.run(("fourbit", dtype, table, group), (array,), code, (packed, absmax))

    def group_absmax(self, x: np.ndarray, dtype: str, group: int, absmax: np.ndarray) -> None:
        self._run(("absmax", group), x, dtype, lambda values: (tops(values.reshape(-1, group)),), absmax)

    def encode_int8(self, x: np.ndarray, dtype: str, columns: int, codes: np.ndarray, absmax: np.ndarray) -> None:
        def code(values: torch.Tensor) -> Tensors:
            return rows_and_groups.int8_rows(values.reshape(-1, columns))

        self._run(("int8", columns), x, dtype, code, codes, absmax)

    def encode_packed(
        self, x: np.ndarray, dtype: str, group: int, bits: int, eps: np.float32, packed: np.ndarray, scales: np.ndarray
    ) -> None:
        def code(values: torch.Tensor) -> Tensors:
            return rows_and_groups.packed_groups(values.reshape(-1, group), dtype, bits, float(eps))

        self._run(("packed", group, bits, float(eps)), x, dtype, code, packed, scales)

    def encode_packed_zero(
        self, x: np.ndarray, dtype: str, group: int, eps: np.float32, packed: np.ndarray, scales: np.ndarray,
        zeros: np.ndarray,
    ) -> None:  # fmt: skip
        def code(values: torch.Tensor) -> Tensors:
            return rows_and_groups.packed_zero_groups(values.reshape(-1, group), dtype, float(eps))

        self._run(("packed with zeros", group, float(eps)), x, dtype, code, packed, scales, zeros)

    def encode_scaled_rows(
        self, x: np.ndarray, dtype: str, kind: str, columns: int, eps: np.float32, codes: np.ndarray, scales: np.ndarray
    ) -> None:
        encode = rows_and_groups.e4m3_rows if kind == "float" else rows_and_groups.integer_rows

        def code(values: torch.Tensor) -> Tensors:
            return encode(values.reshape(-1, columns), dtype, float(eps))

        self._run(("rows", kind, columns, float(eps)), x, dtype, code, codes, scales)

    def encode_affine(
        self, x: np.ndarray, dtype: str, bits: int, group: int, packed: np.ndarray, scales: np.ndarray,
        biases: np.ndarray,
    ) -> None:  # fmt: skip
        def code(values: torch.Tensor) -> Tensors:
            return affine.affine_groups(values.reshape(-1, group), bits)

        self._run(("affine", bits, group), x, dtype, code, packed, scales, biases)

    def encode_blocks(self, x: np.ndarray, dtype: str, kind: str, out: np.ndarray) -> None:
        encode, block = ggml.ENCODERS.get(kind), BLOCK
        if encode is None:
            encode, block = k_quants.ENCODERS.get(kind), k_quants.SUPER
        if encode is None:
            super().encode_blocks(x, dtype, kind, out)
            return
        self._run(("blocks", kind), x, dtype, lambda values: (encode(values.reshape(-1, block)),), out)

    def magnitude_sums(self, x: np.ndarray, dtype: str) -> np.ndarray:
        if self._device.type == "mps":
            return super().magnitude_sums(x, dtype)
        sums = np.empty(-(-x.size // bitnet.SUMMED), np.float64)

        def add(values: torch.Tensor) -> Tensors:
            filled = torch.nn.functional.pad(values.abs().double(), (0, -x.size % bitnet.SUMMED))
            runs = _halved(filled.reshape(-1, bitnet.RUN))
            return (_halved(runs.reshape(-1, bitnet.RUNS)),)

        self._run(("magnitudes",), x, dtype, add, sums)
        return sums

    def pack_ternary(
        self, runs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], dtype: str, inverse: float, out: np.ndarray
    ) -> None:
        sent = [self._sendable(run, dtype) for run in runs]

        def pack(raws: Sequence[torch.Tensor]) -> Tensors:
            scale, total = raws[-1].view(torch.float32), torch.zeros(out.size, dtype=torch.uint8, device=self._device)
            for quarter, (raw, (_, kind)) in enumerate(zip(raws, sent, strict=False)):
                codes = (floats(raw, kind) * scale).round().clamp(-1, 1).to(torch.int8) + 1
                total = total | codes.to(torch.uint8) << (2 * quarter)
            return (total,)

        arrays = [*(array for array, _ in sent), np.full(1, inverse, np.float32)]
        self._transfers.run(("ternary", dtype), arrays, pack, (out,))

    def solve_hqq(
        self, x: np.ndarray, dtype: str, strides: tuple[int, int], size: int, top: int, rounds: bool, tile: int,
        found: tuple[np.ndarray, np.ndarray, np.ndarray], errors: np.ndarray,
    ) -> None:  # fmt: skip
        updates = errors.shape[1]
        unknown = np.flatnonzero(found[2] > updates)
        if not unknown.size:
            return
        groups, is_whole = found[2].size, unknown.size == found[2].size
        shape, by_weight = ((groups, size), 0) if strides[1] == 1 else ((size, groups), 1)
        weights = x.reshape(shape)
        if not is_whole:
            weights = np.take(weights, unknown, axis=by_weight)
        shape = weights.shape
        made = [np.empty(unknown.size, each.dtype) for each in found]
        sums = np.empty((-(-unknown.size // tile), updates))

        def solve(values: torch.Tensor) -> Tensors:
            sent = values.reshape(shape)
            scales, zeros, moved, away = hqq.solve(sent.T.contiguous() if by_weight else sent, top, rounds, updates)
            filled = torch.nn.functional.pad(away.double(), (0, 0, 0, -shape[by_weight] % tile))
            return scales, zeros, moved, filled.reshape(-1, tile, updates).sum(1)

        # Where some groups are left, their number is hardly ever the same again.
        key = ("hqq", by_weight, size, top, rounds, tile, updates) if is_whole else None
        self._run(key, weights.reshape(-1), dtype, solve, *made, sums)
        for one, other in zip(found, made, strict=True):
            one[unknown] = other
        if is_whole:
            errors += sums

    def _run(
        self, key: Hashable, x: np.ndarray, dtype: str, encode: Callable[[torch.Tensor], Tensors], *outs: np.ndarray
    ) -> None:
        """Fill `outs` with what `encode` makes of raw weights, which are float32 on the device: see `Transfers.run`."""
        array, kind = self._sendable(x, dtype)
        given = None if key is None else (key, dtype)
        self._transfers.run(given, (array,), lambda raws: encode(floats(raws[0], kind)), outs)

    def _sendable(self, x: np.ndarray, dtype: str) -> tuple[np.ndarray, str]:
        """Return weights in a dtype that the device holds, and its name: MPS has no bfloat16 and no float64."""
        if self._device.type == "mps" and dtype in ("BF16", "F64"):
            return casts.to_float32(x, dtype), "F32"
        return x, dtype

    # --- comparing

    def keeping(self) -> AbstractContextManager[None]:
        return nullcontext() if self._device.type == "mps" else self._transfers.keeping()  # MPS has no float64

    def keeps(self, x: np.ndarray) -> bool:
        return self._transfers.kept(x) is not None

    def compare(
        self, x: np.ndarray, dtype: str, parts: Sequence[np.ndarray], decoder: Decoder, grid: Grid | None,
        sums: np.ndarray,
    ) -> None:  # fmt: skip
        there = [self._transfers.kept(array) for array in (x, *parts)]
        held = [array for array, raw in zip((x, *parts), there, strict=True) if raw is not None]
        sent = [array for array, raw in zip((x, *parts), there, strict=True) if raw is None]
        count = len(sent)
        if grid is not None:
            sent += [grid.low, grid.high, grid.half]

        def values(raws: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            others = iter(raws)
            source, *coded = (next(others) if raw is None else raw for raw in there)
            return source.view(DTYPES[dtype]), decoder(coded)

        def add(raws: Sequence[torch.Tensor]) -> Tensors:
            source, decoded = values(raws)
            found = [compare.sums(source, decoded)]
            if grid is not None:
                ends = [raw.view(torch.float32) for raw in raws[count:]]
                found.append(compare.is_off(source.float(), decoded, grid.group, grid.slope, ends))
            words = [each for raw in there if raw is not None for each in word_sums(raw)]
            return torch.cat(found), torch.stack(words)

        # A graph reads what is kept where it was when it was recorded.
        places = tuple(None if raw is None else (raw.data_ptr(), raw.numel()) for raw in there)
        bounds = None if grid is None else (grid.group, grid.slope)
        numbers = np.empty(len(compare.SLOTS) + (grid is not None))
        words = np.empty(sum(map(count_of_sums, held)), np.int64)
        self._transfers.run(("compare", decoder, dtype, places, bounds), sent, add, (numbers, words))
        check_sums(held, words)
        slots: tuple[int, ...] = compare.SLOTS
        if not np.isfinite(numbers).all():
            slots = compare.SLOTS + compare.COUNTS
            numbers = np.empty(len(slots))
            self._transfers.run(None, sent, lambda raws: (compare.sums_of_finite(*values(raws)),), (numbers,))
        elif numbers[len(slots) :].any():
            sums[sums_of.WRONG] = 1
        found_sums = sums_of.new_sums()
        found_sums[list(slots)] = numbers[: len(slots)]
        sums_of.merge(sums, found_sums)


def _halved(rows: torch.Tensor) -> torch.Tensor:
    """The sum of each row of 2^k numbers: the second half is added onto the first until one is left."""
    while (width := rows.shape[1] // 2) > 0:
        rows = rows[:, :width] + rows[:, width:]
    return rows[:, 0]
