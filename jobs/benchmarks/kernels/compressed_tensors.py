"""The rows of compressed-tensors' formats in `weightmill bench kernels`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jobs.benchmarks.kernels.measuring import measuring
from jobs.benchmarks.timing import Case, on_threads
from loaders.quantization.kernels import casts
from loaders.quantization.kernels.compressed_tensors import fp4, fp8, int8, packed_int
from loaders.quantization.schemes.compressed_tensors_int import EPS, PackedInt
from loaders.quantization.schemes.compressed_tensors_rowwise import RowScaled

PEERS = ("w4a16", "w8a16", "w4a16_asym", "fp8_dynamic", "w8a8", "fp8_block", "nvfp4a16", "mxfp4a16")


def rows(weight: np.ndarray, threads: int) -> Iterator[Case]:
    """Yield our cases and compressed-tensors' own, for one matrix of bfloat16 bits (R, C)."""
    if weight.shape[0] % 128 or weight.shape[1] % 128:
        yield Case("compressed-tensors' formats", None, "not timed: rows and columns are no multiples of 128")
        return
    yield from _ours(weight, threads)
    yield from _peers(weight)


def _ours(weight: np.ndarray, threads: int) -> Iterator[Case]:
    columns, eps = weight.shape[1], EPS["BF16"]
    codes, scales = np.empty(weight.size, np.uint8), np.empty(weight.size // 16, np.float32)
    small, zeros = np.empty(weight.size // 16, np.uint8), np.empty(weight.size // 128, np.int8)

    def whole(body: Callable[[np.ndarray, int, int], object]) -> Callable[[], None]:
        """Return a call of the body over bands of a multiple of 128 rows, about as large as a job's ranges."""
        step = max(128, (1 << 21) // columns // 128 * 128)
        bands = [(a, min(a + step, weight.shape[0])) for a in range(0, weight.shape[0], step)]

        def part(band: tuple[int, int]) -> None:
            start, stop = band[0] * columns, band[1] * columns
            body(weight[band[0] : band[1]].reshape(-1), start, stop)

        def run() -> None:
            on_threads(threads, part, bands)

        return run

    def packed(bits: int) -> Callable[[np.ndarray, int, int], object]:
        def body(x: np.ndarray, a: int, b: int) -> None:
            own = scales[a // 128 : b // 128]
            packed_int.encode(x, 128, bits, eps, codes[a * bits // 8 : b * bits // 8], own)
            casts.cast(own, "F32", "BF16")

        return body

    def asymmetric(x: np.ndarray, a: int, b: int) -> None:
        own = slice(a // 128, b // 128)
        packed_int.encode_zero(x, 128, eps, codes[a // 2 : b // 2], scales[own], zeros[own])
        packed_int.pack_zeros(zeros[own].reshape(-1, columns // 128))
        casts.cast(scales[own], "F32", "BF16")

    def by_row(encode: Any) -> Callable[[np.ndarray, int, int], object]:
        def body(x: np.ndarray, a: int, b: int) -> None:
            own = scales[a // columns : b // columns]
            encode(x, columns, eps, codes[a:b], own)
            casts.cast(own, "F32", "BF16")

        return body

    def blocks(x: np.ndarray, a: int, b: int) -> None:
        for at in range(0, x.size, 128 * columns):
            own = scales[(a + at) // columns : (a + at) // columns + columns // 128]
            fp8.encode_band(x[at : at + 128 * columns], columns, eps, codes[a + at : a + at + 128 * columns], own)

    def nvfp4(x: np.ndarray, a: int, b: int) -> None:
        # A job makes this pass too, for the global scale, so it counts.
        fp4.largest(x)
        fp4.encode_nv(x, np.float32(22400), codes[a // 2 : b // 2], small[a // 16 : b // 16])

    def mxfp4(x: np.ndarray, a: int, b: int) -> None:
        fp4.encode_mx(x, 7, 255, 127, fp4.mx_thresholds(), codes[a // 2 : b // 2], small[a // 32 : b // 32])

    four, float8 = (measuring(weight, scheme, threads) for scheme in (PackedInt(4, 128), RowScaled("float")))
    yield Case("w4a16, bf16", whole(packed(4)))
    yield Case("w4a16 decode + compare (measuring)", four, after="w4a16, bf16")
    yield Case("w8a16, bf16", whole(packed(8)))
    yield Case("w4a16_asym, bf16", whole(asymmetric))
    yield Case("fp8_dynamic, bf16", whole(by_row(fp8.encode_rows)))
    yield Case("fp8_dynamic decode + compare (measuring)", float8, after="fp8_dynamic, bf16")
    yield Case("w8a8, bf16", whole(by_row(int8.encode_rows)))
    yield Case("fp8_block, bf16", whole(blocks))
    yield Case("nvfp4a16, bf16", whole(nvfp4))
    yield Case("mxfp4a16, bf16", whole(mxfp4))


def _peers(weight: np.ndarray) -> Iterator[Case]:
    """Yield the peers' cases: scales as llm-compressor computes them, then compressed-tensors' compressor."""
    installed = all(importlib.util.find_spec(name) for name in ("torch", "compressed_tensors"))
    for preset in PEERS:
        call, missing = (_Peer(weight, preset), "") if installed else (None, "not installed: compressed-tensors")
        yield Case(f"compressed-tensors {preset}, bf16", call, missing, f"{preset}, bf16")


class _Peer:
    """A case that quantizes with compressed-tensors, which is imported at the first call."""

    def __init__(self, weight: np.ndarray, preset: str) -> None:
        self._weight = weight
        self._preset = preset

    def __call__(self) -> None:
        torch, quantization = (importlib.import_module(name) for name in ("torch", "compressed_tensors.quantization"))
        compressors = importlib.import_module("compressed_tensors.compressors")
        infer_format = importlib.import_module("compressed_tensors.compressors.format").infer_module_format
        scheme = quantization.preset_name_to_scheme(self._preset, ["Linear"])
        args, weight = scheme.weights, torch.from_numpy(self._weight).view(torch.bfloat16)
        if args.strategy == "channel":
            observed = weight.unsqueeze(-2)
        elif args.strategy == "block":
            height, width = (n // 128 for n in weight.shape)
            observed = weight.reshape(height, 128, width, 128).transpose(1, 2).flatten(-2, -1)
        else:
            observed = weight.unflatten(-1, (-1, args.group_size))
        low, high, whole = observed.amin(-1), observed.amax(-1), None
        if args.strategy == "tensor_group":
            whole = quantization.utils.generate_gparam(low.min().reshape(1), high.max().reshape(1))
        scale, zero = quantization.utils.calculate_qparams(low, high, args, global_scale=whole)
        state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
        state |= {} if args.symmetric else {"weight_zero_point": zero}
        state |= {} if whole is None else {"weight_global_scale": whole}
        name = infer_format(torch.nn.Linear, scheme).value
        compressors.BaseCompressor.get_value_from_registry(name).compress(state, scheme)
