"""compressed-tensors' formats of E2M1 codes: NVFP4A16 (nvfp4-pack-quantized), MXFP4A16, MXFP4 (mxfp4-pack-quantized).

Shapes: R rows, C columns. By role:
    weight_packed         uint8 (R, C / 2)         two codes a byte, the first low
    weight_scale          NVFP4: F8_E4M3 (R, C / 16); MXFP4: uint8 (R, C / 32), an exponent plus 127 (E8M0)
    weight_global_scale   float32 (1,)             NVFP4 only; w = code * weight_scale / weight_global_scale
Bytes are those of compressed-tensors 0.20 and of llm-compressor's model_free_ptq; see
kernels/compressed_tensors/fp4.py. Fused partners (q/k/v, gate/up, w1/w3) share their global scale, as engines that fuse
them need. That includes an expert's gate and up, whose scales model_free_ptq leaves apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from loaders.dtypes import DTYPES
from loaders.errors import VerifyFailed
from loaders.quantization.kernels import casts
from loaders.quantization.kernels.compressed_tensors.groups import MX_GROUP, NV_GROUP
from loaders.quantization.scheme import Block, Sink, Stored, View, Work
from loaders.quantization.schemes.compressed_tensors_int import UNDERFLOW, is_ragged, refuses_matrix, scale_dtype
from loaders.specs import StoredSpec, TensorSpec

RANGE_OF_CODES = 448.0 * 6.0  # the greatest E4M3 scale times the greatest E2M1 code
# torch.finfo(dtype).tiny, to which generate_gparam in compressed_tensors raises the largest magnitude
SMALLEST = {"BF16": np.float32(2.0**-126), "F16": np.float32(2.0**-14), "F32": np.float32(2.0**-126)}


def _refuses(spec: TensorSpec, scheme: str, group: int) -> str | None:
    refusal = refuses_matrix(spec, scheme)
    if refusal is None and spec.shape[1] % group:
        return f"its {spec.shape[1]} columns do not divide into {scheme}'s groups of {group}"
    return refusal


def _stored(spec: TensorSpec, group: int, scales: str) -> dict[str, StoredSpec]:
    rows, columns = spec.shape
    return {
        "weight_packed": StoredSpec(DTYPES["U8"], (rows, columns // 2)),
        "weight_scale": StoredSpec(DTYPES[scales], (rows, columns // group)),
    }


@dataclass(frozen=True, slots=True)
class CompressedNvfp4:
    """NVFP4 weights. `global_scale` is that of the fused group, or None until `share` has found it."""

    kind: ClassVar[str] = "nvfp4"
    engine: ClassVar[str] = "compressed-tensors"
    backends: ClassVar[tuple[str, ...]] = ("cpu",)
    # No weight is off by more than itself; a tensor far smaller than its partners has coarse scales, or none.
    error_limit: ClassVar[float] = 1.01
    global_scale: float | None = None

    def refuses(self, spec: TensorSpec) -> str | None:
        return _refuses(spec, "NVFP4", NV_GROUP)

    def is_ragged(self, spec: TensorSpec) -> bool:
        return is_ragged(spec, NV_GROUP)

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        whole = StoredSpec(DTYPES["F32"], (1,))
        return {**_stored(spec, NV_GROUP, "F8_E4M3"), "weight_global_scale": whole}

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def share(self, views: Sequence[View], work: Work) -> CompressedNvfp4:
        """Return this scheme with the views' global scale, which takes their largest magnitude to 448 * 6.

        Raises:
            VerifyFailed: a view holds NaN or infinities.
        """
        tops = [_largest(view, work) for view in views]
        for view, top in zip(views, tops, strict=True):
            if not math.isfinite(top):
                raise VerifyFailed(
                    f"{view.spec.name}: it holds NaN or infinities, and NVFP4's global scale, the largest magnitude of"
                    " it and its fused partners, would be one too; keep the tensor by a rule"
                )
        found = _global_scale(max(tops), scale_dtype(views[0].spec.dtype).name)
        return replace(self, global_scale=found)

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        from loaders.quantization.kernels.compressed_tensors import fp4
        from loaders.quantization.kernels.cpu import kernel_input

        if self.global_scale is None:
            self.share([view], work).encode(view, sink, work)
            return
        spec, whole = view.spec, np.float32(self.global_scale)

        def encode_range(start: int, stop: int) -> None:
            x = kernel_input(view.read(start, stop), spec.dtype.name)
            packed = work.array("packed", x.size // 2, np.uint8)
            scales = work.array("scales", x.size // NV_GROUP, np.uint8)
            fp4.encode_nv(x, whole, packed, scales)
            sink.write("weight_packed", start // 2, packed)
            sink.write("weight_scale", start // NV_GROUP, scales)

        sink.write("weight_global_scale", 0, np.array([whole], np.float32))
        work.sweep(spec.numel, NV_GROUP, encode_range)

    def range_align(self, spec: TensorSpec) -> int:
        return self.align(spec)

    def align(self, spec: TensorSpec) -> int:
        return NV_GROUP

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """About one scale: half of E2M1's widest gap, which also bounds by how much the largest weight is cut off.

        It is cut off where its scale was rounded down: by a sixteenth of 6 scales and roundings, which is less than
        one; and by 6 * 2^-10 where E4M3's gaps are 2^-9.
        """
        from loaders.quantization.kernels.mlx import microfloat_scales

        group, whole = NV_GROUP, abs(float(stored.read("weight_global_scale", 0, 1)[0]))
        scales = stored.read("weight_scale", start // group, -(-stop // group)) & np.uint8(0x7F)
        largest = float(microfloat_scales.e4m3_table()[scales.max(initial=0)])
        return (largest * 1.1 + 6 * 2.0**-10) / whole * (1 + 2**-6) + UNDERFLOW * (spec.dtype.name == "F16")

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels.compressed_tensors import fp4

        whole = stored.read("weight_global_scale", 0, 1)[0]
        scales = stored.read("weight_scale", start // NV_GROUP, stop // NV_GROUP)
        fp4.decode_nv(stored.read("weight_packed", start // 2, stop // 2), scales, whole, out)

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels.compressed_tensors import fp4
        from loaders.quantization.kernels.cpu import kernel_input

        x, whole = kernel_input(block, source), stored.read("weight_global_scale", 0, 1)[0]
        scales = stored.read("weight_scale", start // NV_GROUP, stop // NV_GROUP)
        fp4.compare_nv(x, stored.read("weight_packed", start // 2, stop // 2), scales, whole, sums)
        return True


def _global_scale(top: float, dtype: str) -> float:
    """Return 2688 / top as torch divides a number by a tensor: by its reciprocal, in the tensor's dtype, rounding
    twice.

    An infinite scale becomes 1, as in generate_gparam.
    """

    def rounded(value: np.float32) -> np.float32:
        return np.float32(casts.to_float32(casts.cast(np.array([value], np.float32), "F32", dtype), dtype)[0])

    with np.errstate(over="ignore"):  # an infinity is replaced below
        found = rounded(rounded(np.float32(1) / max(np.float32(top), SMALLEST[dtype])) * np.float32(RANGE_OF_CODES))
    return float(found) if np.isfinite(found) else 1.0


def _largest(view: View, work: Work) -> float:
    """Return the largest magnitude of a whole tensor; it is NaN if a weight is NaN or infinite."""
    from loaders.quantization.kernels.compressed_tensors import fp4
    from loaders.quantization.kernels.cpu import kernel_input

    dtype = view.spec.dtype.name
    tops = work.sweep(
        view.spec.numel, 1, lambda start, stop: float(fp4.largest(kernel_input(view.read(start, stop), dtype)))
    )
    return max(tops) if all(map(math.isfinite, tops)) else math.nan


@dataclass(frozen=True, slots=True)
class CompressedMxfp4:
    """MXFP4 weights; with `activations` the engine quantizes activations too, as it runs."""

    kind: ClassVar[str] = "mxfp4"
    engine: ClassVar[str] = "compressed-tensors"
    backends: ClassVar[tuple[str, ...]] = ("cpu",)
    activations: bool = False

    @property
    def error_limit(self) -> float:
        """The error of the worst groups: one weight of 3.5 scales, and all others midway between 0 and 0.5.

        3.5 scales are the least that a group's largest weight can be. The factor of 1.05 is for scales that float16
        cannot hold.
        """
        others = (MX_GROUP - 1) * 0.25**2
        return math.sqrt(others / (3.5**2 + others)) * 1.05

    def refuses(self, spec: TensorSpec) -> str | None:
        return _refuses(spec, "MXFP4", MX_GROUP)

    def is_ragged(self, spec: TensorSpec) -> bool:
        return is_ragged(spec, MX_GROUP)

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        return _stored(spec, MX_GROUP, "U8")

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        from loaders.quantization.kernels.compressed_tensors import fp4
        from loaders.quantization.kernels.cpu import kernel_input

        spec = view.spec
        mantissa, exponent, bias = fp4.LAYOUT[scale_dtype(spec.dtype).name]

        def encode_range(start: int, stop: int) -> None:
            x = kernel_input(view.read(start, stop), spec.dtype.name)
            packed = work.array("packed", x.size // 2, np.uint8)
            scales = work.array("scales", x.size // MX_GROUP, np.uint8)
            fp4.encode_mx(x, mantissa, (1 << exponent) - 1, bias, fp4.mx_thresholds(), packed, scales)
            sink.write("weight_packed", start // 2, packed)
            sink.write("weight_scale", start // MX_GROUP, scales)

        work.sweep(spec.numel, MX_GROUP, encode_range)

    def range_align(self, spec: TensorSpec) -> int:
        return self.align(spec)

    def align(self, spec: TensorSpec) -> int:
        return MX_GROUP

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """One scale: half of E2M1's widest gap, and what a largest weight, which is below 7 scales, is cut off."""
        from loaders.quantization.kernels.mlx import microfloat_scales

        group = MX_GROUP
        scales = stored.read("weight_scale", start // group, -(-stop // group))
        largest = float(microfloat_scales.power_values(scales.max(initial=0, keepdims=True))[0])
        return largest * (1 + 2**-4) + 6 * UNDERFLOW * (spec.dtype.name == "F16")

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels.compressed_tensors import fp4

        scales = stored.read("weight_scale", start // MX_GROUP, stop // MX_GROUP)
        fp4.decode_mx(stored.read("weight_packed", start // 2, stop // 2), scales, out)

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels.compressed_tensors import fp4
        from loaders.quantization.kernels.cpu import kernel_input

        scales = stored.read("weight_scale", start // MX_GROUP, stop // MX_GROUP)
        packed = stored.read("weight_packed", start // 2, stop // 2)
        fp4.compare_mx(kernel_input(block, source), packed, scales, sums)
        return True
