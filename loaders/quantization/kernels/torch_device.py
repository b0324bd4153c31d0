"""The kernels in torch, for CUDA and MPS: blocks go to the device, codes come back.

The arithmetic is that of the CPU kernels, operation by operation in float32, so the bytes are the same wherever the
device rounds a float32 product and quotient correctly and keeps subnormal numbers. CUDA does. MPS flushes subnormals,
so groups whose weights are all below 1e-38 may differ there, and has no float64: sums for `ternary` are then taken on
the CPU. Every output is measured by the CPU's decoder whatever encoded it.

The tests run these kernels on torch's own CPU device, and on a GPU where there is one (pytest -m gpu). On an H100 their
bytes were those of the CPU, and whole jobs 35 to 70 % slower; on MPS they have not been run yet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loaders.errors import BadSpec
from loaders.quantization.kernels import bitnet
from loaders.quantization.kernels.bitsandbytes import fourbit
from loaders.quantization.kernels.cpu import CpuKernels


class DeviceKernels:
    """The encoders of `Kernels` in torch, on one device."""

    def __init__(self, device: str) -> None:
        is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if not is_there[device.partition(":")[0]]:
            raise BadSpec(f"backend={device}: torch {torch.__version__} finds no such device here; use backend=cpu")
        self._device = torch.device(device)

    def _values(self, x: np.ndarray, dtype: str) -> torch.Tensor:
        """Return raw weights as float32 on the device. Read-only arrays are copied: torch warns when it takes one."""
        raw = torch.from_numpy(np.array(x) if not x.flags.writeable else x)
        raw = raw.view(torch.bfloat16) if dtype == "BF16" else raw
        if dtype == "F64" or (dtype == "BF16" and self._device.type == "mps"):  # which MPS does not hold
            raw = raw.float()
        return raw.to(self._device).float()

    def encode_fourbit(
        self, x: np.ndarray, dtype: str, table: str, group: int, packed: np.ndarray, absmax: np.ndarray
    ) -> None:
        codes, tops = fourbit_codes(self._values(x, dtype).reshape(-1, group), table)
        packed[:] = codes.cpu().numpy()
        absmax[:] = tops.cpu().numpy()

    def group_absmax(self, x: np.ndarray, dtype: str, group: int, absmax: np.ndarray) -> None:
        absmax[:] = _tops(self._values(x, dtype).reshape(-1, group)).cpu().numpy()

    def magnitude_sums(self, x: np.ndarray, dtype: str) -> np.ndarray:
        if self._device.type == "mps":
            return CpuKernels().magnitude_sums(x, dtype)
        magnitudes = self._values(x, dtype).abs().double()
        filled = torch.nn.functional.pad(magnitudes, (0, -x.size % bitnet.SUMMED))
        runs = _halved(filled.reshape(-1, bitnet.RUN))
        sums: np.ndarray = _halved(runs.reshape(-1, bitnet.RUNS)).cpu().numpy()
        return sums

    def pack_ternary(
        self, runs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], dtype: str, inverse: float, out: np.ndarray
    ) -> None:
        scale = torch.tensor(inverse, dtype=torch.float32, device=self._device)
        total: Any = 0
        for quarter, run in enumerate(runs):
            codes = (self._values(run, dtype) * scale).round().clamp(-1, 1).to(torch.int8) + 1
            total = total | codes.to(torch.uint8) << (2 * quarter)
        out[:] = total.cpu().numpy()


def fourbit_codes(groups: torch.Tensor, table: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two a byte, and largest magnitudes of float32 groups (G, group), on the device that they are on."""
    code = fourbit.table(table)
    tops = _tops(groups)
    scaled = groups * (1.0 / tops.clamp(min=1e-38))[:, None]
    bounds = torch.from_numpy(code.bounds[:15]).to(groups.device)
    ranks = torch.bucketize(scaled.reshape(-1).clamp(-1, 1), bounds)
    codes = torch.from_numpy(code.order).to(groups.device)[ranks]
    return codes[::2] << 4 | codes[1::2], tops


def _halved(rows: torch.Tensor) -> torch.Tensor:
    """The sum of each row of 2^k numbers: the second half is added onto the first until one is left."""
    while (width := rows.shape[1] // 2) > 0:
        rows = rows[:, :width] + rows[:, width:]
    return rows[:, 0]


def _tops(groups: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each row; it is NaN if one is."""
    return groups.abs().amax(dim=1)
