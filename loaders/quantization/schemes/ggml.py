"""ggml's tensor types, as llama.cpp stores and loads them: blocks along each row, and plain floats.

Stored, by role: weight, in the dtype of the type's name (loaders/dtypes.py), of the tensor's shape. Bytes are those of
ggml's reference quantizers (llama.cpp, ggml/src/ggml-quants.c), for float32, float16 and bfloat16 sources; with an
importance matrix those of its quantizers that take one. What a block holds is described in kernels/ggml/blocks.py,
mxfp4.py, k_quants.py and ternary.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from loaders.dtypes import DTYPES, GGML_BLOCKS, WEIGHT_DTYPES
from loaders.errors import setting
from loaders.quantization import grid as grids
from loaders.quantization.grid import Grid
from loaders.quantization.kernels import casts
from loaders.quantization.read_only.ggml import decode_blocks
from loaders.quantization.scheme import Block, PartRange, Sink, Stored, View, Work
from loaders.quantization.schemes.bitnet import absmean
from loaders.quantization.schemes.plain import Plain
from loaders.specs import StoredSpec, TensorSpec

FLOATS = ("F32", "F16", "BF16")
TYPES = (*GGML_BLOCKS, *FLOATS)
ON_DEVICE = ("Q8_0", "Q4_0")  # those of kernels/device/ggml.py, which imports torch
# Types whose codes an importance matrix changes.
WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
# Types whose levels lie at unequal distances, and the share of a value by which half a gap grows: from 6 at zero to 12
# between 89 and 113.
LEVELS, LEVELS_SLOPE = ("IQ4_NL", "IQ4_XS"), 6 / 89
BY_ROW = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")  # of these, those that weigh by the mean square of a row
SEARCHED_ON_DEVICE = ("Q2_K", "Q4_K", "Q5_K", "Q6_K")  # those of kernels/device/k_quants.py
# The number of steps between the values of the greatest and of the least code of a block: see `Ggml.error_limit`.
STEPS = {"Q8_0": 254, "Q4_0": 16, "Q4_1": 15, "Q5_0": 32, "Q5_1": 31}


# Types whose codes are found by one rounding, without a search: the byte of a block's scale, whether a minimum follows
# it, by how many steps a weight may be off, and the greatest code; see `Ggml.greatest_error`.
ROUNDED = {
    "Q8_0": (0, False, 0.5, 127), "Q4_0": (0, False, 1.0, 8), "Q4_1": (0, True, 0.5, 15), "Q5_0": (0, False, 1.0, 16),
    "Q5_1": (0, True, 0.5, 31), "TQ1_0": (52, False, 0.5, 1), "TQ2_0": (64, False, 0.5, 1),
}  # fmt: skip

WEIGHTED_LIMIT = 4.0
# The greatest code of MXFP4, half the gap between codes at zero, and how it grows with a value: see grid.py. ggml
# doubles E2M1's codes and halves scales.
DOUBLED_E2M1 = 12, 2 * grids.E2M1_HALF, grids.E2M1_SLOPE + grids.SMALL


class TernaryView:
    """Another view's weights rounded to -1, 0 or 1 times one scale, as float32."""

    def __init__(self, view: View, scale: np.float32) -> None:
        self.spec = replace(view.spec, dtype=DTYPES["F32"])
        self._view = view
        self._scale = scale

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        values = casts.to_float32(self._view.read(start, stop, slot), self._view.spec.dtype.name)
        return np.clip(np.rint(values * (np.float32(1) / self._scale)), -1, 1).astype(np.float32) * self._scale


@dataclass(frozen=True, slots=True)
class Ggml:
    """A tensor type of ggml: a block format, or F32, F16, BF16.

    `absmean` is for the ternary types: weights are first rounded to -1, 0 or 1 times the mean magnitude of the whole
    tensor, as BitNet's layers do in training, and BitnetModel in llama.cpp's convert_hf_to_gguf.py. Without it a
    ternary type takes each block's largest magnitude as its scale. `is_weighted` is for types in WEIGHTED: errors count
    by the importance of their input channel, and `importance`, float32 (matrices, columns), has those of a tensor.
    """

    kind: ClassVar[str] = "ggml"
    engine: ClassVar[str] = "ggml"
    type: str
    absmean: bool = False
    is_weighted: bool = False
    importance: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def backends(self) -> tuple[str, ...]:
        """The CPU, and for types of one rounding a GPU, too; the others search for their scales."""
        return ("cpu", "cuda") if self.type in ON_DEVICE and not self.is_weighted else ("cpu",)

    @property
    def searched_on(self) -> tuple[str, ...]:
        return ("cuda",) if self.type in SEARCHED_ON_DEVICE and not self.is_weighted else ()

    @property
    def error_limit(self) -> float:
        """The error of the worst blocks, if float16 holds their scales as normal numbers.

        A tensor whose scales are mostly smaller cannot be stored in these types. For the types in STEPS, the worst
        block has one weight of magnitude 1 and 31 others that are off by half a step, s = 2 / steps; the far end of
        Q4_0 and Q5_0 may be off by a whole step: sqrt(31 s^2/4 + s^2). The other types can lose what is small beside
        its neighbours altogether: the K-quants whole sub-blocks, MXFP4 and the ternary types whatever is below a
        quarter or half of the greatest. What is lost comes back as less than it was, never as more, so that the error
        is at most the weights themselves. Where errors count by an importance, channels without any may become
        whatever suits the others.
        """
        if self.type in FLOATS:
            return Plain(self.type).error_limit
        if self.is_weighted:
            return WEIGHTED_LIMIT
        if self.type in STEPS:
            step = 2 / STEPS[self.type]
            return float(np.sqrt(31 * step**2 / 4 + step**2)) * 1.01 + 2**-10
        return 1.01

    def refuses(self, spec: TensorSpec) -> str | None:
        if self.type not in TYPES:
            return f"{self.type} is read, not written: its codes come from calibration or training"
        if spec.dtype.name not in WEIGHT_DTYPES and spec.dtype.block == 1:
            return f"its dtype is {spec.dtype}; {self.type} takes {', '.join(WEIGHT_DTYPES)}, and other blocks of ggml"
        if self.type in FLOATS:
            return None
        if len(spec.shape) < 2 or spec.numel == 0:
            return f"its shape is {list(spec.shape)}; {self.type} takes matrices"
        block = DTYPES[self.type].block
        if spec.shape[-1] % block:
            return (
                f"its rows of {spec.shape[-1]} weights do not divide into {self.type}'s blocks of {block}; give it"
                f" another type by a rule ({setting('pure')}=false falls back as llama.cpp does)"
            )
        return None

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        return {"weight": StoredSpec(DTYPES[self.type], spec.shape)}

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        if self.type in FLOATS:
            Plain(self.type).encode(view, sink, work)
            return
        dtype = DTYPES[self.type]
        view = TernaryView(view, absmean(view, work)) if self.absmean else view
        assert self.is_weighted == (self.importance is not None), "its importances are read where it is encoded"
        if self.is_weighted:
            from loaders.quantization.kernels.ggml.weighted import encode_weighted

        def encode_range(start: int, stop: int) -> None:
            out = work.array("blocks", dtype.size((stop - start,)), np.uint8)
            block = view.read(start, stop)
            if self.importance is None:
                work.kernels.encode_blocks(block, view.spec.dtype.name, self.type, out)
            else:
                rows = view.spec.numel // self.importance.size
                encode_weighted(block, view.spec.dtype.name, self.type, start, rows, self.importance, out)
            sink.write("weight", dtype.size((start,)), out)

        work.sweep(view.spec.numel, self.range_align(view.spec), encode_range)

    def range_align(self, spec: TensorSpec) -> int:
        return spec.shape[-1] if self.is_weighted and self.type in BY_ROW else self.align(spec)

    def align(self, spec: TensorSpec) -> int:
        return DTYPES[self.type].block

    @property
    def _is_plain_block(self) -> bool:
        return self.type in ROUNDED and not self.absmean and not self.is_weighted

    @property
    def _is_fitted(self) -> bool:
        """Whether codes stay as a search for a scale had them, though another is stored, or levels are uneven."""
        return self.type in LEVELS or (self.is_weighted and self.type in BY_ROW)

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """Half a step, or a whole one at the far end of Q4_0 and Q5_0, where those have one code less.

        To that comes what float16's roundings of scale and minimum, 2^-11 or 2^-25 each, move the greatest code, and
        2^-8 of the greatest value for a cast. Types that search for their codes have no bound here but a `grid`.
        """
        from loaders.quantization.kernels.ggml import bounds

        if not self._is_plain_block:
            return math.inf
        at, has_offset, steps, top = ROUNDED[self.type]
        size = DTYPES[self.type].size
        blocks, block = stored.read("weight", size((start,)), size((stop,))), size((DTYPES[self.type].block,))
        scale = bounds.largest_half(blocks, block, at)
        offset = bounds.largest_half(blocks, block, at + 2) if has_offset else 0.0
        cast = 2**-8 if spec.dtype.name != "F32" else 0.0
        return scale * (steps + top * (2**-10 + cast)) + offset * (2**-10 + cast) + (top + 2) * 2.0**-24

    def grid(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> Grid | None:
        """Return the grid of kernels/ggml/bounds.py; None for types that have a `greatest_error` instead."""
        from loaders.quantization.kernels.ggml import bounds

        if self.type not in bounds.GROUPS or self._is_plain_block:
            return None
        dtype, group = DTYPES[self.type], bounds.GROUPS[self.type]
        low, high, half = (np.empty((stop - start) // group, np.float32) for _ in range(3))
        bounds.grid(self.type, stored.read("weight", dtype.size((start,)), dtype.size((stop,))), low, high, half)
        slope = grids.SMALL + (LEVELS_SLOPE if self.type in LEVELS else 0)
        slope += grids.E2M1_SLOPE if self.type == "MXFP4" else 0
        return Grid(group, low, high, half, slope)

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        if self.type in FLOATS:
            return Plain(self.type).compare(spec, stored, start, stop, block, source, sums)
        from loaders.quantization.kernels.cpu import kernel_input

        size, x = DTYPES[self.type].size, kernel_input(block, source)
        blocks = stored.read("weight", size((start,)), size((stop,)))
        if self._is_fitted:
            return False
        if self._is_plain_block:
            from loaders.quantization.kernels.ggml.compare import COMPARERS

            COMPARERS[self.type](blocks, x, sums)
        else:
            from loaders.quantization.kernels.ggml.compare_nearest import NEAREST

            is_cast = source != spec.dtype.name
            symmetric, exact = grids.symmetric_terms(*DOUBLED_E2M1, is_cast), grids.room_terms(grids.SMALL, is_cast)
            NEAREST[self.type](blocks, x, symmetric if self.type == "MXFP4" else exact, sums)
        return True

    def parts_on_device(self, spec: TensorSpec, start: int, stop: int) -> Sequence[PartRange] | None:
        from loaders.quantization.kernels.device.decode import BLOCKS

        size = DTYPES[self.type].size
        return (("weight", size((start,)), size((stop,))),) if self.type in BLOCKS else None

    def decode_on_device(self, spec: TensorSpec, parts: Sequence[Any], count: int) -> Any:
        from loaders.quantization.kernels.device.decode import BLOCKS

        dtype = DTYPES[self.type]
        return BLOCKS[self.type](parts[0].reshape(-1, dtype.size((dtype.block,))))

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        if self.type in FLOATS:
            Plain(self.type).decode(spec, stored, start, stop, out, work)
            return
        dtype = DTYPES[self.type]
        decode_blocks(self.type, stored.read("weight", dtype.size((start,)), dtype.size((stop,))), out)
