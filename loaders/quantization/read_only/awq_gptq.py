"""Decoders of AWQ's and GPTQ's integer weights, which are only read: making them takes calibration data.

By role, for a weight of R outputs and C inputs with G groups of inputs:
    AWQ, version gemm                        GPTQ, of b = 2 to 8 bits
    qweight  int32 (C, R/8)                  qweight  int32 (C*b/32, R)
    qzeros   int32 (G, R/8)                  qzeros   int32 (G, R*b/32)
    scales   float16 (G, R)                  scales   float16 (G, R)
                                             g_idx    int32 (C,): each input's group; without it groups lie in order
From its lowest bits on, a word of AWQ holds the outputs 0 2 4 6 1 3 5 7; GPTQ's are in order, and where b does not
divide 32 a code goes on in the next word. GPTQ's first format stores zeros less one, modulo 2**b; gptq_v2 stores them
as they are. AutoRound stores the same; its zeros less one have no modulus, so that a stored 2**b - 1 means 2**b.

Values are (code - zero) * scale, as AutoAWQ (awq/utils/packing_utils.py), AutoGPTQ (qlinear_cuda_old.py) and AutoRound
(auto_round_extension/torch) compute them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loaders.errors import BadCheckpoint
from loaders.quantization.boxes import ByBoxes
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Stored, Work
from loaders.specs import TensorSpec

WORDS = 1 << 20  # words of qweight that are read at once: 4 MiB


@dataclass(frozen=True)
class Awq(ByBoxes):
    """AWQ of four bits, version gemm. `group_size` inputs share a scale; `scale_dtype` is the dtype stored for it."""

    kind: ClassVar[str] = "awq"
    group_size: int
    scale_dtype: str

    def decode_box(
        self, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
    ) -> None:
        from loaders.quantization.kernels.read_only import awq_gptq

        width = spec.shape[0] // 8
        first, last = rows[0] // 8, rows[-1] // 8 + 1
        outputs = np.arange(rows.start, rows.stop, rows.step) - first * 8
        many = max(1, WORDS // width)
        for at in range(columns.start, columns.stop, many):
            end = min(columns.stop, at + many)
            groups = np.arange(at, end) // self.group_size
            used, local = np.unique(groups, return_inverse=True)
            scales = _rows_of(stored, "scales", used, spec.shape[0], rows, self.scale_dtype)
            packed = np.stack([stored.read("qzeros", g * width + first, g * width + last).copy() for g in used])
            zeros = _codes(packed.view(np.uint32), 4, awq_gptq.AWQ_SHIFTS)[:, outputs]
            words = stored.read("qweight", at * width, end * width).view(np.uint32).reshape(-1, width)
            # Turned once, so that an output's words lie together: else every word would cost a cache line.
            words = np.ascontiguousarray(words[:, first:last].T)
            part = out[:, at - columns.start : end - columns.start]
            awq_gptq.decode_outputs(words, outputs, local, zeros.T.astype(np.float32), scales, part)


@dataclass(frozen=True, kw_only=True)
class Gptq(ByBoxes):
    """GPTQ. `zero_offset` is what stored zeros lack, modulo 2**bits if it `wraps`; `has_index`: there is a g_idx."""

    kind: ClassVar[str] = "gptq"
    bits: int
    group_size: int
    zero_offset: int
    has_index: bool
    scale_dtype: str
    wraps: bool = True

    def decode_box(
        self, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
    ) -> None:
        from loaders.quantization.kernels.read_only import awq_gptq

        height = spec.shape[0]
        many = max(1, WORDS // height) * (32 // self.bits)
        for at in range(columns.start, columns.stop, many):
            end = min(columns.stop, at + many)
            used, local = np.unique(self._groups(spec, stored, at, end), return_inverse=True)
            scales = _rows_of(stored, "scales", used, height, rows, self.scale_dtype)
            zeros = self._zeros(stored, used, height, rows)
            first, last = at * self.bits // 32, -(-end * self.bits // 32)
            words = stored.read("qweight", first * height, last * height).view(np.uint32).reshape(-1, height)
            words = np.ascontiguousarray(words[:, rows.start : rows.stop : rows.step].T)
            part = out[:, at - columns.start : end - columns.start]
            awq_gptq.decode_inputs(words, self.bits, at * self.bits - first * 32, local, zeros, scales, part)

    def _groups(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Return the groups of inputs [start, stop): int64."""
        if not self.has_index:
            return np.arange(start, stop) // self.group_size
        groups = stored.read("g_idx", start, stop).astype(np.int64)
        count = -(-spec.shape[1] // self.group_size)
        if groups.min() < 0 or groups.max() >= count:
            raise BadCheckpoint(
                f"{spec.name}: its g_idx names group {int(groups.max() if groups.min() >= 0 else groups.min())} of"
                f" {count}; fetch the checkpoint again"
            )
        return groups

    def _zeros(self, stored: Stored, used: np.ndarray, height: int, rows: range) -> np.ndarray:
        """Return the zeros of some outputs (rows) in the groups `used`: float32 (rows, groups)."""
        width = height * self.bits // 32
        first, last = rows[0] * self.bits // 32, -(-(rows[-1] + 1) * self.bits // 32)
        packed = np.stack([stored.read("qzeros", g * width + first, g * width + last).copy() for g in used])
        bits = np.arange(rows.start, rows.stop, rows.step) * self.bits - first * 32
        codes = _codes_at(packed.view(np.uint32), self.bits, bits) + self.zero_offset
        return ((codes & ((1 << self.bits) - 1)) if self.wraps else codes).T.astype(np.float32)


def _codes_at(words: np.ndarray, bits: int, begins: np.ndarray) -> np.ndarray:
    """Unpack the codes that begin at some bits of rows of words (groups, words): int64 (groups, codes)."""
    pairs = words.astype(np.uint64)
    pairs[:, :-1] |= pairs[:, 1:] << np.uint64(32)
    codes = pairs[:, begins // 32] >> (begins % 32).astype(np.uint64)
    return (codes & np.uint64((1 << bits) - 1)).astype(np.int64)


def _codes(words: np.ndarray, bits: int, shifts: np.ndarray) -> np.ndarray:
    """Unpack words (groups, words) into codes (groups, codes), int64, from bit `shifts` of each word on."""
    codes = (words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    return np.asarray(codes.reshape(words.shape[0], -1), np.int64)


def _rows_of(stored: Stored, role: str, groups: np.ndarray, width: int, rows: range, dtype: str) -> np.ndarray:
    """Read some rows and groups of a role's (G, width) items, turned to (rows, groups): float32."""
    found = np.empty((len(rows), groups.size), np.float32)
    for index, group in enumerate(groups):
        block = stored.read(role, int(group) * width + rows[0], int(group) * width + rows[-1] + 1)
        found[:, index] = casts.to_float32(block[:: rows.step], dtype)
    return found
