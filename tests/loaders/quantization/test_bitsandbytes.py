"""bitsandbytes' arithmetic, written out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import ThreadedWork
from loaders.errors import VerifyFailed
from loaders.quantization.kernels.bitsandbytes import dynamic_map
from loaders.quantization.schemes.bitsandbytes_4bit import GROUP_SIZES, Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from tests import reference
from tests.encoding import DTYPE_NAMES, decode, encode, random
from tests.making import Raw, values_of, weights

# --- bitsandbytes' four bits


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(64, 64), (67, 61), (1, 3), (5, 1)])
def test_nf4_is_the_arithmetic_written_out(shape: tuple[int, int], dtype: str, group: int, work: ThreadedWork) -> None:
    raw = random(shape, dtype, seed=group)
    sink, _ = encode(Bnb4("nf4", group), raw, work)
    packed, absmax = reference.encode_nf4(values_of(raw), group)
    assert np.array_equal(sink.stored["weight"], packed)
    assert np.array_equal(sink.stored["weight.absmax"], absmax)


@pytest.mark.parametrize(
    "scale", [2.0**e for e in (-126, -110, -101, -100, -99, -30, 0, 14, 15, 16, 17, 60, 124, 125, 126)]
)
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_bfloat16s_fast_form_gives_the_bytes_of_the_general_one(table: Any, scale: float, work: ThreadedWork) -> None:
    """At every mantissa of the largest magnitude, with every other magnitude below it; where it does not hold, too."""
    mantissas = np.arange(128, dtype=np.uint32)
    tops = ((np.uint32(127) << 23) | (mantissas << 16)).view(np.float32) * np.float32(scale)
    parts = []
    for top in tops:
        bits = np.random.default_rng(int(top.view(np.uint32))).integers(0, (int(top.view(np.uint32)) >> 16) + 1, 63)
        signs = np.random.default_rng(7).integers(0, 2, 63) << 15
        parts.append(np.append(bits | signs, int(top.view(np.uint32)) >> 16).astype(np.uint16))
    blocks = np.stack(parts)
    fast, _ = encode(Bnb4(table), Raw("BF16", blocks), work)
    general, _ = encode(Bnb4(table), Raw("F32", (blocks.astype(np.uint32) << 16).view(np.float32)), work)
    assert np.array_equal(fast.stored["weight"], general.stored["weight"])
    assert np.array_equal(fast.stored["weight.absmax"], general.stored["weight.absmax"])


def test_nf4_of_nf4_is_stable(work: ThreadedWork) -> None:
    scheme = Bnb4("nf4")
    first, _ = encode(scheme, random((64, 64), "F32"), work)
    again, error = encode(scheme, Raw("F32", decode(scheme, random((64, 64), "F32"), first, work)), work)
    assert first.as_bytes() == again.as_bytes()
    assert error.relative_error < 1e-7


def test_the_quant_state_is_spelled_as_bitsandbytes_spells_it(work: ThreadedWork) -> None:
    sink, _ = encode(Bnb4("nf4"), random((4, 32), "BF16"), work)
    state = sink.stored["weight.quant_state.bitsandbytes__nf4"].tobytes().decode()
    assert state == '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 32]}'
    sink, _ = encode(Bnb4("fp4", double_quant=True), random((4, 32), "F16"), work)
    state = sink.stored["weight.quant_state.bitsandbytes__fp4"].tobytes().decode()
    offset = json.loads(state)["nested_offset"]
    assert state == (
        '{"quant_type": "fp4", "blocksize": 64, "dtype": "float16", "shape": [4, 32], "nested_blocksize": 256,'
        f' "nested_dtype": "float32", "nested_offset": {offset}}}'
    )
    assert np.float32(offset) == offset


def test_double_quantization_takes_the_exact_mean_of_the_scales(work: ThreadedWork) -> None:
    raw = random((300, 257), "F32")
    sink, _ = encode(Bnb4("nf4", double_quant=True), raw, work)
    _, absmax = reference.encode_nf4(values_of(raw), 64)
    state = json.loads(sink.stored["weight.quant_state.bitsandbytes__nf4"].tobytes())
    offset = np.float32(absmax.astype(np.float64).mean())
    assert state["nested_offset"] == float(offset)
    codes, tops = dynamic_map.encode(absmax - offset)
    assert np.array_equal(sink.stored["weight.absmax"], codes)
    assert np.array_equal(sink.stored["weight.nested_absmax"], tops)


# --- LLM.int8


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 100), (40, 333)])
@pytest.mark.usefixtures("small_ranges")
def test_int8_is_the_arithmetic_written_out(shape: tuple[int, int], dtype: str, work: ThreadedWork) -> None:
    for scale in (1.0, 1e-3, 1e-6, 1e5):
        raw = weights(values_of(random(shape, dtype, seed=4)) * np.float32(scale), dtype)
        half = values_of(raw).astype(np.float16).astype(np.float32)
        absmax = np.abs(half).max(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.rint(half * (np.float32(1) / absmax * np.float32(127))[:, None])
        sink, _ = encode(LlmInt8(), raw, work)
        assert np.array_equal(sink.stored["weight"], np.nan_to_num(codes).astype(np.int8).reshape(-1))
        assert np.array_equal(sink.stored["SCB"], absmax)
        assert sink.stored["weight_format"].tobytes() == b"\0"


@pytest.mark.parametrize(("value", "is_held"), [(65519.0, True), (65520.0, False), (1e30, False), (np.inf, True)])
def test_int8_refuses_what_float16_cannot_hold(value: float, is_held: bool, work: ThreadedWork) -> None:
    values = np.ones((4, 70), np.float32)
    values[2, 1] = -value
    if is_held:
        _, error = encode(LlmInt8(), weights(values, "F32"), work)
        assert error.nonfinite == (1 if np.isinf(value) else 0)
    else:
        with pytest.raises(VerifyFailed, match=r"w.weight: row 2 holds a weight of magnitude .*float16.* 65504"):
            encode(LlmInt8(), weights(values, "F32"), work)


@pytest.mark.quick
def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert np.array_equal(dynamic_map.dynamic_map(), functional.create_dynamic_map().numpy())


@pytest.mark.engine
def test_scales_are_coded_as_bitsandbytes_codes_them() -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = np.random.default_rng(0)
    for values in (
        rng.standard_normal(10_000),
        rng.standard_normal(300) * 1e-6,
        np.zeros(257),
        np.full(256, 0.5),
        np.ones(1),
    ):
        x = values.astype(np.float32)
        codes, state = functional.quantize_blockwise(torch.from_numpy(x.copy()), blocksize=256)
        mine, tops = dynamic_map.encode(x)
        assert np.array_equal(mine, codes.numpy())
        assert np.array_equal(tops, state.absmax.numpy())
