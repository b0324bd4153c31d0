"""ggml's tensor types: the properties of every scheme, and bytes written out by hand."""

from __future__ import annotations

import threading
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loaders.backends.threads
from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.dtypes import DTYPES, GGML_BLOCKS
from loaders.quantization.kernels import compare, cpu
from loaders.quantization.kernels.cpu import kernel_input
from loaders.quantization.kernels.ggml import bounds
from loaders.quantization.kernels.ggml.decode import DECODERS
from loaders.quantization.kernels.ggml.encode import ENCODERS
from loaders.quantization.scheme import Stored
from loaders.quantization.schemes.ggml import LEVELS, TYPES, Ggml
from loaders.specs import TensorSpec
from tests import reference
from tests.encoding import DTYPE_NAMES, MemorySink, MemoryView, decode, encode, random
from tests.making import Raw, values_of, weights
from tests.plain_cpu import differing
from tests.quick import some_quick

BLOCKS = sorted(GGML_BLOCKS)
# types whose codes are found without a search
ROUNDED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ2_0")
# where super-blocks hold float16s
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,)}


def test_every_block_type_has_an_encoder_and_a_decoder() -> None:
    assert set(ENCODERS) == set(DECODERS) == set(GGML_BLOCKS)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("name", TYPES)
def test_the_bytes_do_not_depend_on_how_a_tensor_is_cut(
    name: str, dtype: str, work: ThreadedWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, found = random((7, 768), dtype), []
    for step in (1 << 21, 1100, 1):
        monkeypatch.setattr(loaders.backends.threads, "RANGE", step)
        sink, error = encode(Ggml(name), raw, work)
        found.append(sink.as_bytes())
        assert error.relative_error <= Ggml(name).error_limit
    assert found[0] == found[1] == found[2]
    assert len(found[0]["weight"]) == Ggml(name).stored(MemoryView(raw).spec)["weight"].size


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("name", TYPES)
def test_zeros_stay_zeros_also_among_others(name: str, dtype: str, work: ThreadedWork) -> None:
    values = np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32)
    values[1] = 0
    raw = weights(values, dtype)
    sink, _ = encode(Ggml(name), raw, work)
    assert not decode(Ggml(name), raw, sink, work)[1].any()


@pytest.mark.parametrize("name", some_quick(BLOCKS, "Q8_0", "Q4_K"))
def test_what_is_measured_is_what_an_independent_decoder_finds(name: str, work: ThreadedWork) -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    raw = random((6, 512), "F32", seed=3)
    sink, error = encode(Ggml(name), raw, work)
    decoded = quants.dequantize(
        sink.stored["weight"].view(np.uint8).reshape(6, -1), constants.GGMLQuantizationType[name]
    )
    source = values_of(raw)
    # float32 sums of at most 4096 squares, each within 2^-24 of itself: the quotient's root is good to 1e-5
    assert error.relative_error == pytest.approx(reference.relative_error(source, decoded), rel=1e-5)
    assert np.array_equal(decode(Ggml(name), raw, sink, work), decoded)


class Held:
    """A `Stored` of one role, in memory."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data

    def read(self, role: str, start: int, stop: int) -> np.ndarray:
        return self._data[start:stop]


def awkward() -> np.ndarray:
    """Weights of every power of two, ties among them, each block of 32 with its own largest: float32 (n,)."""
    rng = np.random.default_rng(5)
    sizes = np.ldexp(1.0, np.repeat(rng.permutation(np.arange(-133, 127)), 256))
    steps = rng.choice([0, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75, 1.9921875], sizes.size)
    return (sizes * steps * rng.choice([1, -1], sizes.size)).astype(np.float32)


def results() -> dict[str, bytes]:
    """The blocks and the measured sums of types, by type and dtype; of those that take long to compile, the sums."""
    found = {}
    ordinary = np.random.default_rng(7).standard_normal(5 * 4096 + 256).astype(np.float32)
    ordinary[300], ordinary[9000] = np.nan, np.inf
    for name in ROUNDED:
        for dtype in ("BF16", "F16", "F32"):
            with np.errstate(over="ignore"):
                raw = weights(np.concatenate([awkward(), ordinary]).reshape(1, -1), dtype)
            x, spec = kernel_input(raw.data.reshape(-1), dtype), MemoryView(raw).spec
            blocks, sums = np.empty(DTYPES[name].size((x.size,)), np.uint8), compare.new_sums()
            ENCODERS[name](x, blocks)
            assert Ggml(name).compare(spec, Held(blocks), 0, x.size, raw.data.reshape(-1), dtype, sums)
            if name == "TQ2_0":
                assert Ggml(name, absmean=True).compare(
                    spec, Held(blocks), 0, x.size, raw.data.reshape(-1), dtype, sums
                )
            found[f"{name} {dtype}"] = blocks.tobytes() + sums.tobytes()
    for name in ("Q3_K", "Q5_K", "Q6_K", "TQ1_0"):
        raw, sums = weights(ordinary.reshape(1, -1), "BF16"), compare.new_sums()
        blocks, x = some_blocks(name, ordinary.size), raw.data.reshape(-1)
        assert Ggml(name).compare(MemoryView(raw).spec, Held(blocks), 0, x.size, x, "BF16", sums)
        decoded = np.empty(x.size, np.float32)
        DECODERS[name](blocks, decoded)
        found[name] = sums.tobytes() + decoded.tobytes()
    return found


def some_blocks(name: str, count: int) -> np.ndarray:
    """Blocks of `count` weights whose bytes are drawn at random, but for ordinary scales: uint8."""
    size = DTYPES[name].size((DTYPES[name].block,))
    blocks = np.random.default_rng(11).integers(0, 256, (count // DTYPES[name].block, size), dtype=np.uint8)
    for at in HALVES[name]:
        blocks[:, at + 1] = blocks[:, at + 1] % 12 + 28  # the exponents of float16s from 2^-8 to 2^-5
    return blocks.reshape(-1)


def measured_slowly(
    scheme: Ggml, spec: TensorSpec, stored: Stored, x: np.ndarray, dtype: str, work: ThreadedWork
) -> np.ndarray:
    """The sums of a range by way of its decoded weights, and held against its grid if all are finite."""
    decoded, sums = np.empty(x.size, np.float32), compare.new_sums()
    scheme.decode(spec, stored, 0, x.size, decoded, work)
    cpu.compare_into(x, dtype, decoded, sums)
    grid = scheme.grid(spec, stored, 0, x.size)
    if grid is not None and not sums[compare.NONFINITE]:
        grid = grid if dtype == spec.dtype.name else grid.after_cast()
        sums[compare.WRONG] = not grid.holds(kernel_input(x, dtype), decoded)
    return sums


SCHEMES = [Ggml(name) for name in TYPES if name not in LEVELS] + [
    Ggml(name, absmean=True) for name in ("TQ1_0", "TQ2_0")
]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.type + " absmean" * scheme.absmean)
def test_the_sums_of_one_call_are_those_of_decoded_weights(scheme: Ggml, dtype: str, work: ThreadedWork) -> None:
    """To the last bit: of weights of ordinary and of every size, cast, not finite, wrongly coded, in a short chunk."""
    ordinary = np.random.default_rng(9).standard_normal(2 * 4096 + 512).astype(np.float32)
    spoiled = np.where(np.isin(np.arange(ordinary.size), (300, 4096)), np.float32(np.nan), ordinary)
    for values in (ordinary,) if scheme.absmean else (ordinary, awkward(), spoiled):
        with np.errstate(over="ignore"):
            raw = weights(values.reshape(1, -1), dtype)
        x = raw.data.reshape(-1)
        for encoded in (raw, weights(values_of(raw), "BF16")):
            spec, sink = MemoryView(encoded).spec, MemorySink(scheme, MemoryView(encoded).spec)
            scheme.encode(MemoryView(encoded), sink, work)
            for is_wrong in (False, True):
                sink.stored["weight"].view(np.uint8)[40] ^= 0xFF if is_wrong else 0
                found = compare.new_sums()
                assert scheme.compare(spec, sink, 0, x.size, x, dtype, found)
                wanted = measured_slowly(scheme, spec, sink, x, dtype, work)
                assert found.tobytes() == wanted.tobytes()
                if values is ordinary and scheme.grid(spec, sink, 0, x.size) is not None:
                    assert found[compare.WRONG] == is_wrong


# the bytes of a block that hold its scales, and the number of steps between the least and the greatest code
GRIDS = {
    "Q2_K": ([*range(16), *range(80, 84)], 3), "Q3_K": ([*range(96, 110)], 7), "Q4_K": ([*range(16)], 15),
    "Q5_K": ([*range(16)], 31), "Q6_K": ([*range(192, 210)], 63), "TQ1_0": ([52, 53], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_that_of_all_weights_that_its_scales_allow(name: str) -> None:
    size, (scales, steps) = DTYPES[name].size((256,)), GRIDS[name]
    rng = np.random.default_rng(13)
    blocks = rng.integers(0, 256, (400, size), dtype=np.uint8)
    for at in HALVES[name]:
        blocks[0, at + 1] = 30  # the sign and the exponent of a float16 of about 2^-8
    blocks[:, scales] = blocks[0, scales]
    decoded = np.empty(400 * 256, np.float32)
    DECODERS[name](blocks.reshape(-1), decoded)
    low, high, half = (np.empty(256 // bounds.GROUPS[name], np.float32) for _ in range(3))
    bounds.grid(name, blocks[0].copy(), low, high, half)
    allowed = decoded.reshape(400, low.size, -1)
    assert np.array_equal(low, allowed.min((0, 2)))
    assert np.array_equal(high, allowed.max((0, 2)))
    # room for roundings in float32, and of the ternary types' scales to float16: see kernels/ggml/bounds.py
    assert np.all(half >= (high - low) / steps / 2)
    assert np.all(half <= (high - low) / steps / 2 + 2.0**-9 * np.maximum(high, -low) + 2.0**-24)


def test_a_plain_cpu_gives_the_same_bytes_and_sums(tmp_path: Path) -> None:
    assert differing(results, tmp_path) == []


@pytest.mark.parametrize("name", ROUNDED)
def test_bfloat16s_give_the_bytes_of_the_same_numbers_in_float32(name: str) -> None:
    raw = weights(awkward(), "BF16")
    found = []
    for dtype, x in (("BF16", raw.data), ("F32", values_of(raw).astype(np.float32))):
        blocks = np.empty(DTYPES[name].size((x.size,)), np.uint8)
        ENCODERS[name](kernel_input(x, dtype), blocks)
        found.append(blocks.tobytes())
    assert found[0] == found[1]


# 2^-10 / 127 is a normal float16, and so are the minima and scales below it that matter
moderate = hnp.arrays(
    np.float32,
    st.sampled_from([(1, 256), (2, 256), (1, 512)]),
    elements=st.floats(-1024, 1024, width=32).map(lambda v: v if abs(v) > 2**-10 else 0.0),
)


@settings(max_examples=60, deadline=None)
@given(values=moderate, name=st.sampled_from(BLOCKS))
def test_no_moderate_weights_come_back_worse_than_the_scheme_admits(values: np.ndarray, name: str) -> None:
    with Crew(1) as crew:
        work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
        _, error = encode(Ggml(name), weights(values, "F32"), work)
    assert error.relative_error <= Ggml(name).error_limit
    assert error.nonfinite == error.nonfinite_decoded == 0


def half(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


def stored(name: str, values: np.ndarray, work: ThreadedWork) -> list[int]:
    sink, _ = encode(Ggml(name), Raw("F32", values.astype(np.float32).reshape(1, -1)), work)
    return list(sink.stored["weight"].view(np.uint8))


def test_blocks_of_32_written_out(work: ThreadedWork) -> None:
    x = np.arange(-16, 16, dtype=np.float32)
    x[0] = -127  # d = 1
    assert stored("Q8_0", x, work) == [*half(1), *(int(v) & 255 for v in x)]
    x = np.arange(-16, 16, dtype=np.float32) / 2  # the greatest is -8: d = 1, code = int(x + 8.5)
    codes = np.minimum(15, (x + 8.5).astype(int))
    packed = [int(a | b << 4) for a, b in zip(codes[:16], codes[16:], strict=True)]
    assert stored("Q4_0", x, work) == [*half(1), *packed]
    x = np.arange(32, dtype=np.float32)
    assert stored("Q5_1", x, work)[:8] == [*half(1), *half(0), 0, 0, 255, 255]  # weights 16 to 31 have the fifth bit
    assert stored("Q4_0", np.zeros(32), work)[:2] == [0, 0x80]  # ggml's zero block: 0 / -8


def test_halves_round_away_from_zero_in_q8_0_and_ternary(work: ThreadedWork) -> None:
    x = np.zeros(32)
    x[:5] = [127, 0.5, -0.5, 1.5, 2.5]
    assert [np.int8(np.uint8(b)) for b in stored("Q8_0", x, work)[2:7]] == [127, 1, -1, 2, 3]
    x = np.zeros(256)
    x[:3] = [1, 0.5, -0.5]
    assert [b & 3 for b in stored("TQ2_0", x, work)[:3]] == [2, 2, 0]


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("Q8_0", (4, 48), "its rows of 48 weights do not divide into Q8_0's blocks of 32"),
    ("Q4_K", (4, 128), "blocks of 256"),
    ("Q8_0", (64,), "takes matrices"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    assert message in str(Ggml(name).refuses(TensorSpec("w", DTYPES["BF16"], shape)))


def test_stacked_matrices_are_one_run_of_rows(work: ThreadedWork) -> None:
    raw = random((3, 4, 256), "BF16")
    whole, _ = encode(Ggml("Q4_K"), raw, work)
    parts = [encode(Ggml("Q4_K"), Raw("BF16", part), work)[0].as_bytes()["weight"] for part in raw.data]
    assert whole.as_bytes()["weight"] == b"".join(parts)
