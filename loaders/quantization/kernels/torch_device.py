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

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from loaders.errors import BadSpec
from loaders.quantization.grid import Grid
from loaders.quantization.kernels import DeviceParts, bitnet
from loaders.quantization.kernels import compare as sums_of
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.quantization.kernels.device import affine, compare, ggml, hqq, k_quants, rows_and_groups
from loaders.quantization.kernels.device.arithmetic import tops
from loaders.quantization.kernels.device.decode import floats
from loaders.quantization.kernels.device.fourbit import fourbit_codes
from loaders.quantization.kernels.device.transfers import KeptSums, Transfers
from loaders.quantization.kernels.ggml.blocks import N as BLOCK


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
        with self._transfers.running():
            made = fourbit_codes(self._transfers.send(x, dtype).reshape(-1, group), table)
            self._transfers.fetch(*zip(made, (packed, absmax), strict=True))

    def group_absmax(self, x: np.ndarray, dtype: str, group: int, absmax: np.ndarray) -> None:
        with self._transfers.running():
            self._transfers.fetch((tops(self._transfers.send(x, dtype).reshape(-1, group)), absmax))

    def encode_int8(self, x: np.ndarray, dtype: str, columns: int, codes: np.ndarray, absmax: np.ndarray) -> None:
        with self._transfers.running():
            made = rows_and_groups.int8_rows(self._transfers.send(x, dtype).reshape(-1, columns))
            self._transfers.fetch(*zip(made, (codes, absmax), strict=True))

    def encode_packed(
        self, x: np.ndarray, dtype: str, group: int, bits: int, eps: np.float32, packed: np.ndarray, scales: np.ndarray
    ) -> None:
        with self._transfers.running():
            groups = self._transfers.send(x, dtype).reshape(-1, group)
            made = rows_and_groups.packed_groups(groups, dtype, bits, float(eps))
            self._transfers.fetch(*zip(made, (packed, scales), strict=True))

    def encode_packed_zero(
        self, x: np.ndarray, dtype: str, group: int, eps: np.float32, packed: np.ndarray, scales: np.ndarray,
        zeros: np.ndarray,
    ) -> None:  # fmt: skip
        with self._transfers.running():
            groups = self._transfers.send(x, dtype).reshape(-1, group)
            made = rows_and_groups.packed_zero_groups(groups, dtype, float(eps))
            self._transfers.fetch(*zip(made, (packed, scales, zeros), strict=True))

    def encode_scaled_rows(
        self, x: np.ndarray, dtype: str, kind: str, columns: int, eps: np.float32, codes: np.ndarray, scales: np.ndarray
    ) -> None:
        encode = rows_and_groups.e4m3_rows if kind == "float" else rows_and_groups.integer_rows
        with self._transfers.running():
            made = encode(self._transfers.send(x, dtype).reshape(-1, columns), dtype, float(eps))
            self._transfers.fetch(*zip(made, (codes, scales), strict=True))

    def encode_affine(
        self, x: np.ndarray, dtype: str, bits: int, group: int, packed: np.ndarray, scales: np.ndarray,
        biases: np.ndarray,
    ) -> None:  # fmt: skip
        with self._transfers.running():
            made = affine.affine_groups(self._transfers.send(x, dtype).reshape(-1, group), bits)
            self._transfers.fetch(*zip(made, (packed, scales, biases), strict=True))

    def encode_blocks(self, x: np.ndarray, dtype: str, kind: str, out: np.ndarray) -> None:
        encode, block = ggml.ENCODERS.get(kind), BLOCK
        if encode is None:
            encode, block = k_quants.ENCODERS.get(kind), k_quants.SUPER
        if encode is None:
            super().encode_blocks(x, dtype, kind, out)
            return
        with self._transfers.running():
            self._transfers.fetch((encode(self._transfers.send(x, dtype).reshape(-1, block)), out))

    def magnitude_sums(self, x: np.ndarray, dtype: str) -> np.ndarray:
        if self._device.type == "mps":
            return super().magnitude_sums(x, dtype)
        sums = np.empty(-(-x.size // bitnet.SUMMED), np.float64)
        with self._transfers.running():
            magnitudes = self._transfers.send(x, dtype).abs().double()
            filled = torch.nn.functional.pad(magnitudes, (0, -x.size % bitnet.SUMMED))
            runs = _halved(filled.reshape(-1, bitnet.RUN))
            self._transfers.fetch((_halved(runs.reshape(-1, bitnet.RUNS)), sums))
        return sums

    def pack_ternary(
        self, runs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], dtype: str, inverse: float, out: np.ndarray
    ) -> None:
        with self._transfers.running():
            scale = torch.full((), inverse, dtype=torch.float32, device=self._device)
            total: Any = 0
            for quarter, run in enumerate(runs):
                values = self._transfers.send(run, dtype, slot=quarter)
                codes = (values * scale).round().clamp(-1, 1).to(torch.int8) + 1
                total = total | codes.to(torch.uint8) << (2 * quarter)
            self._transfers.fetch((total, out))

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
        made = [np.empty(unknown.size, each.dtype) for each in found]
        sums = np.empty((-(-unknown.size // tile), updates))
        with self._transfers.running():
            sent = self._transfers.send(weights.reshape(-1), dtype).reshape(weights.shape)
            scales, zeros, moved, away = hqq.solve(sent.T.contiguous() if by_weight else sent, top, rounds, updates)
            filled = torch.nn.functional.pad(away.double(), (0, 0, 0, -unknown.size % tile))
            added = filled.reshape(-1, tile, updates).sum(1)
            self._transfers.fetch(*zip((scales, zeros, moved, added), (*made, sums), strict=True))
        for one, other in zip(found, made, strict=True):
            one[unknown] = other
        if is_whole:
            errors += sums

    # --- comparing

    def keeping(self) -> AbstractContextManager[None]:
        return nullcontext() if self._device.type == "mps" else self._transfers.keeping()  # MPS has no float64

    def keeps(self, x: np.ndarray) -> bool:
        return self._transfers.kept(x) is not None

    def compare(
        self, x: np.ndarray, dtype: str, read: Callable[[str, int, int], np.ndarray],
        decode: Callable[[DeviceParts], Any], grid: Callable[[], Grid | None], sums: np.ndarray,
    ) -> bool:  # fmt: skip
        raw = self._transfers.kept(x)
        assert raw is not None
        with self._transfers.running():
            parts = _Parts(self._transfers, read)
            parts.sums.add(x, raw)
            if (decoded := decode(parts)) is None:
                return False
            source = floats(raw, dtype)
            found = [compare.sums(source, decoded)]
            if (nearest := grid()) is not None:
                ends = [parts.sent(each).view(torch.float32) for each in (nearest.low, nearest.high, nearest.half)]
                found.append(compare.is_off(source, decoded, nearest, ends))
            numbers = np.empty(sum(each.numel() for each in found))
            self._transfers.fetch((torch.cat(found), numbers), parts.sums.made())
            parts.sums.check()
            slots: tuple[int, ...] = compare.SLOTS
            if not np.isfinite(numbers).all():
                slots = compare.SLOTS + compare.COUNTS
                numbers = np.empty(len(slots))
                self._transfers.fetch((compare.sums_of_finite(source, decoded), numbers))
            elif numbers[len(slots) :].any():
                sums[sums_of.WRONG] = 1
        found_sums = sums_of.new_sums()
        found_sums[list(slots)] = numbers[: len(slots)]
        sums_of.merge(sums, found_sums)
        return True


class _Parts:
    """Stored parts on the device: copies that it keeps, or else new ones. `sums` are those of the kept ones' words."""

    def __init__(self, transfers: Transfers, read: Callable[[str, int, int], np.ndarray]) -> None:
        self.sums = KeptSums()
        self._transfers = transfers
        self._read = read
        self._sent = 0

    def read(self, role: str, start: int, stop: int) -> torch.Tensor:
        part = self._read(role, start, stop)
        if (raw := self._transfers.kept(part)) is None:
            return self.sent(part)
        self.sums.add(part, raw)
        return raw

    def sent(self, array: np.ndarray) -> torch.Tensor:
        """Return a copy of an array's bytes on the device."""
        self._sent += 1
        return self._transfers.bytes_of(array, f"part {self._sent}")


def _halved(rows: torch.Tensor) -> torch.Tensor:
    """The sum of each row of 2^k numbers: the second half is added onto the first until one is left."""
    while (width := rows.shape[1] // 2) > 0:
        rows = rows[:, :width] + rows[:, width:]
    return rows[:, 0]
