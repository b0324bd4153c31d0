"""What every scheme must satisfy, and what the gate holds of each."""

from __future__ import annotations

import threading

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loaders.backends.threads
from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.dtypes import DTYPES, GGML_BLOCKS
from loaders.errors import VerifyFailed
from loaders.quantization.gate import Gate
from loaders.quantization.kernels import compare, cpu
from loaders.quantization.measure import Comparison, measure
from loaders.quantization.scheme import Bounded, Compared, Gridded, Scheme, View
from loaders.quantization.schemes.bitnet import Ternary
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedMxfp4, CompressedNvfp4
from loaders.quantization.schemes.compressed_tensors_fp8_block import Fp8Block
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.quantization.schemes.compressed_tensors_rowwise import RowScaled
from loaders.quantization.schemes.ggml import Ggml
from loaders.quantization.schemes.hqq import Hqq
from loaders.quantization.schemes.mlx_affine import MlxAffine
from loaders.quantization.schemes.mlx_float import MlxFloat
from loaders.quantization.schemes.plain import Plain
from loaders.specs import TensorSpec
from loaders.tensors.views import encoded_view
from tests import reference
from tests.encoding import DTYPE_NAMES, MemorySink, MemoryView, decode, encode, random, tensors_of
from tests.making import Raw, values_of, weights
from tests.quick import some_quick

SCHEMES: dict[str, Scheme] = {
    "nf4": Bnb4("nf4"),
    "nf4 g128": Bnb4("nf4", 128),
    "nf4 double": Bnb4("nf4", double_quant=True),
    "nf4 bf16 storage": Bnb4("nf4", storage="bfloat16"),
    "fp4": Bnb4("fp4"),
    "fp4 double": Bnb4("fp4", double_quant=True),
    "int8": LlmInt8(),
    "ternary": Ternary(),
    "ternary auto": Ternary("autobitlinear"),
    "hqq8": Hqq(8),
    "hqq4": Hqq(4),
    "hqq4 axis 0": Hqq(4, axis=0),
    "hqq3 g8": Hqq(3, 8),
    "hqq3 axis 0": Hqq(3, 24, axis=0),
    "hqq2 bf16": Hqq(2, 8, compute_dtype="BF16"),
    "hqq1 g16": Hqq(1, 16),
    "hqq1 axis 0": Hqq(1, 32, axis=0),
    "w4a16": PackedInt(4),
    "w4a16 g32": PackedInt(4, 32),
    "w8a16": PackedInt(8),
    "w4a16 asym": PackedInt(4, 64, symmetric=False),
    "w8a8": RowScaled("int"),
    "fp8 dynamic": RowScaled("float"),
    "fp8 block": Fp8Block(),
    "nvfp4": CompressedNvfp4(),
    "mxfp4": CompressedMxfp4(),
    "mlx 4": MlxAffine(4),
    "mlx 8 g32": MlxAffine(8, 32),
    "mlx 2 g128": MlxAffine(2, 128),
    "mlx 3": MlxAffine(3),
    "mlx 5": MlxAffine(5),
    "mlx 6": MlxAffine(6),
    "mlx mxfp4": MlxFloat("mxfp4"),
    "mlx mxfp8": MlxFloat("mxfp8"),
    "mlx nvfp4": MlxFloat("nvfp4"),
    "bf16": Plain("BF16"),
    "copy": Plain(),
}


def fitting(scheme: Scheme, values: np.ndarray, dtype: str = "F32") -> np.ndarray:
    """Values repeated over as many more columns as it takes for the scheme to store the matrix."""
    for columns in range(values.shape[1], values.shape[1] + 4096):
        if scheme.refuses(TensorSpec("w.weight", DTYPES[dtype], (values.shape[0], columns))) is None:
            return np.pad(values, ((0, 0), (0, columns - values.shape[1])), mode="wrap")
    raise AssertionError("no such shape")


# --- every scheme


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_the_bytes_do_not_depend_on_how_a_tensor_is_cut(
    name: str, dtype: str, work: ThreadedWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = random(fitting(SCHEMES[name], np.empty((72, 68))).shape, dtype)
    found = []
    for step in (1 << 21, 300, 37):
        monkeypatch.setattr(loaders.backends.threads, "RANGE", step)
        sink, error = encode(SCHEMES[name], raw, work)
        found.append(sink.as_bytes())
        assert error.relative_error <= SCHEMES[name].error_limit
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_zeros_stay_zeros(name: str, dtype: str, work: ThreadedWork) -> None:
    raw = weights(fitting(SCHEMES[name], np.zeros((64, 65), np.float32)), dtype)
    sink, error = encode(SCHEMES[name], raw, work)
    assert not decode(SCHEMES[name], raw, sink, work).any()
    assert error.relative_error == 0


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_an_all_zero_group_among_others_decodes_to_zeros(name: str, work: ThreadedWork) -> None:
    values = fitting(SCHEMES[name], np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32))
    columns = getattr(SCHEMES[name], "axis", 1) == 0  # its groups are those of the matrix (group_size, groups)
    shape = (SCHEMES[name].group_size, -1) if columns else values.shape  # type: ignore[attr-defined]
    some = (slice(None), slice(10, 14)) if columns else slice(10, 14)
    values.reshape(shape)[some] = 0
    raw = weights(values, "BF16")
    sink, _ = encode(SCHEMES[name], raw, work)
    assert not decode(SCHEMES[name], raw, sink, work).reshape(shape)[some].any()


@pytest.mark.usefixtures("small_ranges")
@pytest.mark.parametrize(
    "name", some_quick(sorted(SCHEMES), "nf4", "int8", "hqq4", "mlx 4", "mlx nvfp4", "w4a16", "w8a8", "ternary", "copy")
)
def test_what_is_measured_is_what_an_independent_decoder_finds(name: str, work: ThreadedWork) -> None:
    scheme = SCHEMES[name]
    raw = random(fitting(scheme, np.empty((52, 66))).shape, "F32", seed=3)
    sink, error = encode(scheme, raw, work)
    tensors = tensors_of(scheme, sink, raw)
    if isinstance(scheme, Bnb4):
        decoded = reference.decode_bnb4(tensors, "w.weight")
    elif isinstance(scheme, Ternary):
        decoded = reference.decode_ternary(tensors, "w.weight", scheme.linear_class)
    elif isinstance(scheme, Hqq):
        decoded = reference.decode_hqq(tensors, "w")
    elif isinstance(scheme, LlmInt8):
        decoded = reference.decode_int8(tensors, "w")
    elif scheme.engine == "compressed-tensors":
        decoded = reference.decode_compressed_tensors(tensors, "w")
    elif isinstance(scheme, MlxAffine):
        decoded = reference.decode_mlx(tensors, "w", scheme.bits)
    elif isinstance(scheme, MlxFloat):
        decoded = reference.decode_mlx_float(tensors, "w", scheme.bits, scheme.mode)
    elif isinstance(scheme, Plain):
        decoded = values_of(tensors["w.weight"])
    else:
        pytest.fail(f"{type(scheme).__name__}: write its decoder in tests/reference.py, and call it here")
    source = values_of(raw)
    # float32 sums of at most 4096 squares, each within 2^-24 of itself: the quotient's root is good to 1e-5
    assert error.relative_error == pytest.approx(reference.relative_error(source, decoded), rel=1e-5, abs=1e-12)
    assert error.max_error == pytest.approx(float(np.abs(source - decoded).max()), rel=1e-6, abs=1e-12)
    assert np.array_equal(decode(scheme, raw, sink, work), decoded)


# settings of schemes with a `compare` that it is not made for: groups that are columns, or hold no whole vectors
IN_PIECES = {"hqq4 axis 0", "hqq3 axis 0", "hqq1 axis 0", "hqq3 g8", "hqq2 bf16"}


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("name", sorted(name for name, scheme in SCHEMES.items() if isinstance(scheme, Compared)))
def test_what_is_compared_is_what_is_decoded(name: str, dtype: str, work: ThreadedWork) -> None:
    """Also in chunks that hold NaN and infinities, of tiny weights, and from within the tensor."""
    scheme = SCHEMES[name]
    values = np.random.default_rng(5).standard_normal((72, 272)).astype(np.float32)
    values[40:56] *= 1e-30
    if name != "nvfp4" and not any(each in name for each in ("double", "ternary", "hqq")):  # refused if not finite
        values[64, 3], values[65, 5], values[66, 7] = np.nan, np.inf, -np.inf
    raw = weights(fitting(scheme, values), dtype)
    view = MemoryView(raw)
    sink = MemorySink(scheme, view.spec)
    scheme.encode(view, sink, work)
    count, align = view.spec.numel, scheme.align(view.spec)
    for start in (0, count // 3 // align * align):
        decoded, wanted, found = np.empty(count - start, np.float32), compare.new_sums(), compare.new_sums()
        scheme.decode(view.spec, sink, start, count, decoded, work)
        cpu.compare_into(view.read(start, count), dtype, decoded, wanted)
        assert isinstance(scheme, Compared)
        is_done = scheme.compare(view.spec, sink, start, count, view.read(start, count), dtype, found)
        assert is_done == (name not in IN_PIECES)
        if is_done:
            assert found == pytest.approx(wanted, rel=1e-5)
        else:
            assert not found.any()
            continue
        assert found[compare.NONFINITE] == wanted[compare.NONFINITE]


AT_ONCE: dict[str, Scheme] = {
    name: SCHEMES[name] for name in ("hqq8", "hqq4", "hqq1 g16", "ternary", "ternary auto")
} | {"hqq3": Hqq(3), "hqq2 f16": Hqq(2, 128, compute_dtype="F16"), "ggml TQ2_0 of the mean": Ggml("TQ2_0", True)}


@pytest.mark.parametrize("fault", ["none", "weights not finite", "a wrong code", "a scale not finite"])
@pytest.mark.parametrize(("dtype", "cast"), [("BF16", None), ("F16", None), ("F32", None), ("F32", "BF16")])
@pytest.mark.parametrize("name", AT_ONCE)
def test_what_is_compared_at_once_has_the_sums_of_pieces(
    name: str, dtype: str, cast: str | None, fault: str, work: ThreadedWork
) -> None:
    """To the last bit, in ranges that begin and end within runs of codes; what is not finite shows only in `sums`."""
    scheme = AT_ONCE[name]
    columns = 256 if isinstance(scheme, Ggml) else 384 if isinstance(scheme, Hqq) else 383
    raw = weights(np.random.default_rng(4).standard_normal((152, columns)).astype(np.float32), dtype)
    view: View = MemoryView(raw)
    seen = view if cast is None else encoded_view(view, DTYPES[cast])
    sink = MemorySink(scheme, seen.spec)
    scheme.encode(seen, sink, work)
    block = raw.data.reshape(-1).copy()
    if fault == "weights not finite":
        bits = block.view(np.uint32 if dtype == "F32" else np.uint16)
        infinity = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
        bits[block.size // 2], bits[block.size // 2 + 99] = infinity, infinity + 1
    elif fault == "a wrong code":
        codes = sink.stored["W_q" if isinstance(scheme, Hqq) else "weight"].view(np.uint8)
        codes[codes.size // 2] ^= 0xFF
    elif fault == "a scale not finite" and isinstance(scheme, Hqq):
        scales = sink.stored["scale"]
        scales[scales.size // 2] = 0x7F80 if scales.dtype == np.uint16 else np.inf
    comparison, align, count = Comparison(scheme, view.spec, seen.spec, work), scheme.align(seen.spec), block.size
    for start, stop in ((0, count), (count // 3 // align * align, count // 3 * 2 // align * align)):
        wanted, found = compare.new_sums(), compare.new_sums()
        with np.errstate(invalid="ignore"):
            comparison._decode_and_compare(block[start:stop], sink, start, stop, wanted)
            assert isinstance(scheme, Compared)
            assert scheme.compare(seen.spec, sink, start, stop, block[start:stop], dtype, found)
        assert found.tobytes() == wanted.tobytes()
        if start == 0:
            assert bool(found[compare.WRONG]) == (fault == "a wrong code" and isinstance(scheme, Gridded))
            assert bool(found[compare.NONFINITE]) == (fault == "weights not finite")


@pytest.mark.parametrize("name", ["mxfp4", "mlx mxfp4", "mlx nvfp4"])
def test_every_bfloat16_is_coded_as_its_float32_is(name: str, work: ThreadedWork) -> None:
    """In groups whose scale is 1 in both dtypes, so that the arithmetic is the same."""
    every = np.arange(0x40C1, dtype=np.uint32)  # up to 6
    every = np.append(every, every | 0x8000)
    rows = np.concatenate([np.full((-(-every.size // 15), 1), 0x40C0), np.resize(every, (-(-every.size // 15), 15))], 1)
    rows = np.resize(rows.astype(np.uint16), (rows.shape[0] // 2 * 2 + 2, 16)).reshape(-1, 32)
    fast, _ = encode(SCHEMES[name], Raw("BF16", rows), work)
    general, _ = encode(SCHEMES[name], Raw("F32", (rows.astype(np.uint32) << 16).view(np.float32)), work)
    assert fast.as_bytes() == general.as_bytes()


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_what_is_stored_is_what_was_planned(name: str, work: ThreadedWork) -> None:
    raw = random(fitting(SCHEMES[name], np.empty((48, 40))).shape, "F16")
    sink, _ = encode(SCHEMES[name], raw, work)
    for role, part in SCHEMES[name].stored(MemoryView(raw).spec).items():
        size = sink.stored[role].nbytes
        assert part.size - 24 <= size <= part.size if part.is_bound else size == part.size


finite = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=4, max_side=24).map(lambda s: (s[0] // 4 * 4, s[1])),
    elements=st.floats(-(2.0**66), 2.0**66, width=32, allow_subnormal=True),
)
HALF = {"int8": np.float32(2.0**-51)}  # for schemes that take float16's range alone


@settings(max_examples=40, deadline=None)
@given(values=finite, name=st.sampled_from(sorted(n for n in SCHEMES if "double" not in n and "storage" not in n)))
def test_no_finite_weights_come_back_worse_than_the_scheme_admits(values: np.ndarray, name: str) -> None:
    with Crew(1) as crew:
        work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
        values = np.clip(values, -2600, 2600) if name == "mlx nvfp4" else values  # its scales end at 448
        raw = weights(fitting(SCHEMES[name], values) * HALF.get(name, np.float32(1)), "F32")
        _, error = encode(SCHEMES[name], raw, work)
    tiny = np.abs(values).max() < 1e-30  # there float32's own steps are coarse
    assert tiny or name == "bf16" or Gate().fault("w", error, SCHEMES[name]) is None
    assert error.nonfinite == error.nonfinite_decoded == 0


@pytest.mark.parametrize("scheme", [Bnb4("nf4", double_quant=True), Ternary(), Hqq()])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_schemes_with_one_scale_for_all_refuse_weights_that_are_not_finite(
    scheme: Scheme, bad: float, work: ThreadedWork
) -> None:
    values = np.ones((64, 64), np.float32)
    values[3, 3] = bad
    with pytest.raises(VerifyFailed, match="it holds NaN or infinities"):
        encode(scheme, weights(values, "F32"), work)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_weights_that_are_not_finite_are_counted_and_stay_in_their_group(dtype: str, work: ThreadedWork) -> None:
    values = np.full((64, 64), 0.5, np.float32)
    values[3, 3], values[5, 0], values[9, 9] = np.nan, np.inf, -np.inf
    for scheme in (Bnb4("nf4"), Plain()):
        _, error = encode(scheme, weights(values, dtype), work)
        assert error.nonfinite == 3
    decoded = decode(Bnb4("nf4"), weights(values, dtype), encode(Bnb4("nf4"), weights(values, dtype), work)[0], work)
    assert np.isfinite(np.delete(decoded, [3, 5, 9], axis=0)).all()


# --- faults of an encoder

FAULTY = {"nf4": "weight.absmax", "nf4 g128": "weight.absmax", "fp4": "weight.absmax", "int8": "SCB",
          "w4a16": "weight_scale", "w4a16 g32": "weight_scale", "w8a16": "weight_scale", "w4a16 asym": "weight_scale",
          "w8a8": "weight_scale", "fp8 dynamic": "weight_scale"}  # fmt: skip
CODES = {
    "w4a16": "weight_packed",
    "w4a16 g32": "weight_packed",
    "w8a16": "weight_packed",
    "w4a16 asym": "weight_packed",
}


@pytest.mark.parametrize("part", ["a code", "a scale doubled", "a scale halved"])
@pytest.mark.parametrize("name", FAULTY)
def test_one_wrong_code_or_scale_of_many_does_not_pass(name: str, part: str, work: ThreadedWork) -> None:
    """As an encoder would store it, so that no hash tells; of 65536 weights one code or one scale is wrong."""
    scheme, raw = SCHEMES[name], random((128, 512), "BF16", seed=9)
    sink, error = encode(scheme, raw, work)
    view = MemoryView(raw)
    assert Gate().fault("w", error, scheme) is None
    if part == "a code":
        codes = sink.stored[CODES.get(name, "weight")].view(np.uint8)
        at = 1000 if name != "int8" else int(np.abs(codes.view(np.int8)).argmin())
        codes[at] ^= 0xC0 if name != "fp8 dynamic" else 0x40
    else:
        scales = sink.stored[FAULTY[name]]
        if scales.dtype == np.uint16:  # bfloat16
            scales[1] = scales[1] + 0x80 if part == "a scale doubled" else scales[1] - 0x80
        else:
            scales[1] *= 2 if part == "a scale doubled" else 0.5
    wrong = measure(view, scheme, view.spec, sink, work, lambda count: None)
    assert Gate().fault("w", wrong, scheme) is not None


@pytest.mark.parametrize(
    ("dtype", "cast"), [("BF16", None), ("F16", None), ("F32", None), ("F32", "BF16"), ("F32", "F16")]
)
@pytest.mark.parametrize("name", FAULTY)
def test_no_right_code_is_taken_for_a_wrong_one(name: str, dtype: str, cast: str | None, work: ThreadedWork) -> None:
    """Rows of every magnitude, sparse, one-signed, constant, on codes' edges; cast before they are encoded or not."""
    rng, scheme = np.random.default_rng(11), SCHEMES[name]
    rows = rng.standard_normal((96, 256)).astype(np.float32)
    most = 4 if "F16" in (dtype, cast) or name == "int8" else 36
    rows *= np.logspace(-44, most, 96, dtype=np.float64)[:, None].astype(np.float32)
    rows[::7], rows[1::9] = np.abs(rows[::7]), -np.abs(rows[1::9])
    rows[2::11, ::3], rows[4::13] = 0, rows[4::13, :1]
    rows[5::17] = np.round(rng.uniform(-128, 128, rows[5::17].shape) * 2) / 2
    view: View = MemoryView(weights(np.clip(rows, -6e4, 6e4) if most == 4 else rows, dtype))
    seen = view if cast is None else encoded_view(view, DTYPES[cast])
    sink = MemorySink(scheme, seen.spec)
    scheme.encode(seen, sink, work)
    assert isinstance(scheme, Bounded)
    for start in range(0, view.spec.numel, 2048):  # in small ranges, that have only their own scales
        decoded = np.empty(2048, np.float32)
        scheme.decode(seen.spec, sink, start, start + 2048, decoded, work)
        found = values_of(Raw(dtype, view.read(start, start + 2048)))
        greatest = scheme.greatest_error(seen.spec, sink, start, start + 2048)
        assert np.abs(found.astype(np.float64) - decoded).max() <= greatest


# the other schemes whose scales say how far a weight may be off
HELD = {n: scheme for n, scheme in SCHEMES.items() if isinstance(scheme, Gridded | Bounded) and n not in FAULTY}
HELD |= {"ggml TQ2_0 of the mean": Ggml("TQ2_0", absmean=True)} | {f"ggml {name}": Ggml(name) for name in GGML_BLOCKS}


def awkward_rows(most: float) -> np.ndarray:
    """Rows of every magnitude, sparse, one-signed, constant, on codes' edges, and far from zero."""
    rng = np.random.default_rng(11)
    rows = rng.standard_normal((76, 256)).astype(np.float32)
    rows *= np.logspace(-44, most, 76, dtype=np.float64)[:, None].astype(np.float32)
    rows[::7], rows[1::9] = np.abs(rows[::7]), -np.abs(rows[1::9])
    rows[2::11, ::3], rows[4::13] = 0, rows[4::13, :1]
    rows[5::17] = np.round(rng.uniform(-128, 128, rows[5::17].shape) * 2) / 2
    rows[6::17] += 1000 * rows[6::17].max(axis=1, keepdims=True)
    rows[7::19, :64] = 0
    return rows


@pytest.mark.parametrize(
    ("dtype", "cast"), [("BF16", None), ("F16", None), ("F32", None), ("F32", "BF16"), ("F32", "F16")]
)
@pytest.mark.parametrize("name", HELD)
def test_no_right_code_is_taken_for_one_that_is_not_the_nearest(
    name: str, dtype: str, cast: str | None, work: ThreadedWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders.backends.threads, "RANGE", 512)  # that have only their own scales
    most = 4 if "F16" in (dtype, cast) or name.startswith("ggml") else 30
    rows = awkward_rows(most)
    rows = np.clip(rows, -6e4, 6e4) if most == 4 else rows
    view: View = MemoryView(weights(fitting(HELD[name], rows), dtype))
    seen = view if cast is None else encoded_view(view, DTYPES[cast])
    sink = MemorySink(HELD[name], seen.spec)
    HELD[name].encode(seen, sink, work)
    error = measure(view, HELD[name], seen.spec, sink, work, lambda count: None)
    assert np.isfinite(error.error2)


few = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0**-25, 2.0**-14, 1e-7, 448.0, 6.0, 3.5, 1 / 3, 2.0**-130, 60000.0])


@settings(max_examples=90, deadline=None)
@given(
    values=hnp.arrays(np.float32, (4, 32), elements=st.one_of(few, st.floats(-4, 4, width=32)), fill=few),
    name=st.sampled_from(sorted(HELD)),
    dtype=st.sampled_from(DTYPE_NAMES),
)
def test_no_few_values_are_taken_for_wrong_ones(values: np.ndarray, name: str, dtype: str) -> None:
    """Groups that hold little else than ties, constants, and the ends of formats."""
    with Crew(1) as crew:
        work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
        _, error = encode(HELD[name], weights(fitting(HELD[name], values), dtype), work)
    assert np.isfinite(error.error2)


@pytest.mark.parametrize("name", HELD)
def test_one_code_of_65536_that_is_not_the_nearest_is_found(name: str, work: ThreadedWork) -> None:
    """As an encoder would store it, so that no hash tells: one code gets another top bit."""
    scheme = HELD[name]
    raw = random(fitting(scheme, np.empty((128, 512))).shape, "F32", seed=9)
    sink, error = encode(scheme, raw, work)
    assert Gate().fault("w", error, scheme) is None
    right = decode(scheme, raw, sink, work)
    role = next(role for role in ("weight_packed", "W_q", "weight") if role in sink.stored)
    codes = sink.stored[role].view(np.uint8)
    at = codes.size // 2 + 10
    dtype = DTYPES[scheme.type] if isinstance(scheme, Ggml) else DTYPES["U8"]
    if dtype.block == 256:
        at += 20 if dtype.name in ("TQ1_0", "TQ2_0") else 50  # beyond the block's scales
    moved = []
    for bit in (0x80, 0x40):
        codes[at] ^= bit
        moved.append(np.abs(decode(scheme, raw, sink, work) - right))
        codes[at] ^= bit
    codes[at] ^= 0x80 if moved[0].max() >= moved[1].max() else 0x40
    assert 1 <= np.count_nonzero(max(moved, key=np.max)) <= (5 if dtype.name == "TQ1_0" else 1)
    wrong = measure(MemoryView(raw), scheme, MemoryView(raw).spec, sink, work, lambda count: None)
    assert "not the nearest" in (Gate().fault("w", wrong, scheme) or "")
