"""compressed-tensors' bytes on any CPU, and its form for bfloat16."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.quantization.kernels import compare
from loaders.quantization.scheme import Compared, Scheme
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedMxfp4, CompressedNvfp4
from loaders.quantization.schemes.compressed_tensors_fp8_block import Fp8Block
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.quantization.schemes.compressed_tensors_rowwise import RowScaled
from tests import reference
from tests.encoding import MemorySink, MemoryView, decode
from tests.making import Raw, values_of, weights
from tests.plain_cpu import differing

SCHEMES: dict[str, Scheme] = {
    "w4a16": PackedInt(4, 32),
    "w8a16": PackedInt(8, 32),
    "w4a16_asym": PackedInt(4, 32, symmetric=False),
    "fp8_dynamic": RowScaled("float"),
    "w8a8": RowScaled("int"),
    "fp8_block": Fp8Block(),
    "nvfp4a16": CompressedNvfp4(),
    "mxfp4a16": CompressedMxfp4(),
}


def encode(scheme: Scheme, raw: Raw) -> MemorySink:
    view = MemoryView(raw)
    sink = MemorySink(scheme, view.spec)
    with Crew(1) as crew:
        scheme.encode(view, sink, ThreadedWork(kernels_of("cpu"), crew, threading.Event()))
    return sink


# --- bytes


def results() -> dict[str, bytes]:
    """Everything stored and decoded of awkward weights, by scheme and dtype."""
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((40, 256)) * 0.02).astype(np.float32)
    for row, factor in enumerate((0, -0.0, 1e-30, 1e-36, 1e-43, 1e-38, 1e-5, 1e-7, 1e4)):
        rows[row] *= np.float32(factor)
    rows[9] = np.linspace(-7.5, 7.5, 256)
    rows[10] = np.arange(256) - 3
    rows[11] = 0.01
    found = {}
    for name, scheme in SCHEMES.items():
        for dtype in ("BF16", "F16", "F32"):
            raw = weights(rows, dtype)
            sink = encode(scheme, raw)
            with Crew(1) as crew:
                work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
                decoded = decode(scheme, raw, sink, work).tobytes()
            assert isinstance(scheme, Compared)
            sums, spec = compare.new_sums(), MemoryView(raw).spec
            scheme.compare(spec, sink, 0, spec.numel, raw.data.reshape(-1), dtype, sums)
            found[f"{name} {dtype} sums"] = sums.tobytes()
            found[f"{name} {dtype}"] = b"".join(data for _, data in sorted(sink.as_bytes().items())) + decoded
    return found


def test_a_plain_cpu_gives_the_same_bytes(tmp_path: Path) -> None:
    assert differing(results, tmp_path) == []


def bf16(values: np.ndarray) -> np.ndarray:
    return values_of(weights(values, "BF16"))


@pytest.mark.parametrize("exponent", [-99, -30, 0, 30])
def test_a_product_stands_for_every_quotient_of_bfloat16s(exponent: int) -> None:
    """All mantissas of the largest weight by all of the others', over many binades, by row: E4M3 and integers.

    From the fourteenth binade on, E4M3's codes are subnormal, and none is left from the twentieth on.
    """
    mantissas = (1 + np.arange(128, dtype=np.float32) / 128) * np.float32(2.0**exponent)
    binades = (*range(1, 12), 14, 15, 16, 18, 20)
    others = np.concatenate([(1 + np.arange(128, dtype=np.float32) / 128) * np.float32(2.0**-e) for e in binades])
    values = np.stack([np.append(top, others * np.float32(2.0**exponent)) for top in mantissas])
    values[:, 1::3] *= -1
    raw = weights(values, "BF16")
    for kind, divisor in (("float", 448), ("int", 127.5)):
        scales = bf16(values[:, :1] / np.float32(divisor))
        quotients = bf16(values / scales)
        sink = encode(RowScaled(kind), raw)  # type: ignore[arg-type]
        assert np.array_equal(sink.stored["weight_scale"], weights(scales, "BF16").data.reshape(-1))
        codes = sink.stored["weight"].reshape(values.shape)
        if kind == "int":
            assert np.array_equal(codes.view(np.int8), np.clip(np.rint(quotients), -128, 127).astype(np.int8))
        else:
            table = reference.e4m3(np.arange(127))
            nearest = np.abs(np.clip(np.abs(quotients), 0, 448)[..., None] - table)
            best = nearest.min(-1, keepdims=True)
            even = np.where(nearest == best, np.arange(127) % 2, 2).argmin(-1)  # of two as near, the even code
            assert np.array_equal(codes & 0x7F, even)
            assert np.array_equal(codes >> 7, quotients < 0)


def test_scales_that_are_too_small_or_large_for_the_product_are_divided_by() -> None:
    rng = np.random.default_rng(5)
    for scale in (1e-37, 1e-33, 1e-31, 1e31, 1e33, 1e36):
        values = bf16((rng.standard_normal((4, 64)) * scale).astype(np.float32))
        scales = bf16(np.abs(values).max(1, keepdims=True) / np.float32(127.5))
        codes = encode(RowScaled("int"), weights(values, "BF16")).stored["weight"].view(np.int8).reshape(4, 64)
        assert np.array_equal(codes, np.clip(np.rint(bf16(values / scales)), -128, 127))


def test_the_first_code_is_the_lowest() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :4] = 7.5, 1, -2, 3
    assert encode(PackedInt(4, 32), weights(values, "BF16")).stored["weight_packed"].view(np.uint32)[0] == 0x8888B69F
    assert encode(CompressedMxfp4(), weights(values, "BF16")).stored["weight_packed"][:2].tolist() == [0x16, 0x3A]
    assert encode(CompressedMxfp4(), weights(values, "BF16")).stored["weight_scale"].tolist() == [128]
    values[0, 4:16] = -6
    fours = encode(CompressedNvfp4(), weights(np.clip(values, -6, 6), "BF16"))
    assert fours.stored["weight_global_scale"].tolist() == [448]
    assert fours.stored["weight_scale"].tolist() == [0x7E, 0x20]  # 448; of a group of zeros the least, 0.125
    assert fours.stored["weight_packed"][:3].tolist() == [0x27, 0x5C, 0xFF]
