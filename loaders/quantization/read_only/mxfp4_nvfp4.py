"""Decoders of float4 weights that are only read: gpt-oss' and DeepSeek V4's MXFP4, and ModelOpt's NVFP4.

MXFP4, by role: blocks, uint8 (..., R, C/32, 16); scales, uint8 (..., R, C/32), powers of two (e8m0).
DeepSeek V4 stores the same by other names: weight, int8 (R, C/2); scale, F8_E8M0 or uint8 (R, C/32).
NVFP4, by role: weight, uint8 (..., R, C/2); weight_scale, F8_E4M3 (..., R, C/16); weight_scale_2, one float32, which
multiplies the others. All hold two codes a byte, the first low. For DeepSeek V4 the sources of that order are
transformers 5.23 (integrations/finegrained_fp8.py, Fp8Dequantize._unpack_fp4) and mlx-lm 0.32.2, which hands the same
bytes to MLX as they are (models/deepseek_v41.py).

Values are code * scale, for NVFP4 code * (scale * scale_2), in float32, as transformers' convert_moe_packed_tensors
(integrations/mxfp4.py) and ModelOpt's NVFP4QTensor.dequantize compute them. A scale byte of 255 is NaN here, by the
format's definition; transformers takes it for 2**128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loaders.quantization.boxes import ByBoxes, read_rows
from loaders.quantization.read_only.deepseek_fp8 import e8m0
from loaders.quantization.scheme import Stored, Work
from loaders.specs import TensorSpec


@dataclass(frozen=True)
class GptOssMxfp4(ByBoxes):
    """MXFP4: groups of 32 weights share a power of two."""

    kind: ClassVar[str] = "mxfp4"
    group: ClassVar[int] = 32

    def decode_box(
        self, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
    ) -> None:
        from loaders.quantization.kernels.read_only.fp4 import decode_fp4

        scales = e8m0(read_rows(stored, "scales", rows, spec.shape[-1] // self.group))
        packed = read_rows(stored, "blocks", rows, spec.shape[-1] // 2)
        decode_fp4(packed, scales, columns.start, self.group, out)


@dataclass(frozen=True)
class DeepSeekFp4(ByBoxes):
    """DeepSeek V4's experts: groups of 32 weights share a power of two."""

    kind: ClassVar[str] = "fp4"
    group: ClassVar[int] = 32

    def decode_box(
        self, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
    ) -> None:
        from loaders.quantization.kernels.read_only.fp4 import decode_fp4

        scales = e8m0(read_rows(stored, "scale", rows, spec.shape[-1] // self.group))
        packed = read_rows(stored, "weight", rows, spec.shape[-1] // 2).view(np.uint8)
        decode_fp4(packed, scales, columns.start, self.group, out)


@dataclass(frozen=True)
class ModelOptNvfp4(ByBoxes):
    """ModelOpt's NVFP4: groups of 16 weights share a float8, and all of them one float32."""

    kind: ClassVar[str] = "nvfp4"
    group: ClassVar[int] = 16

    def decode_box(
        self, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
    ) -> None:
        from loaders.quantization.kernels.read_only.fp4 import decode_fp4
        from loaders.quantization.kernels.read_only.fp8_int8 import E4M3

        top = stored.read("weight_scale_2", 0, 1)[0]
        scales = E4M3[read_rows(stored, "weight_scale", rows, spec.shape[-1] // self.group)] * top
        packed = read_rows(stored, "weight", rows, spec.shape[-1] // 2)
        decode_fp4(packed, scales, columns.start, self.group, out)
