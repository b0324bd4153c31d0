"""A torch device encodes to the bytes of the CPU's kernels: torch's CPU device, and a GPU where there is one."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from loaders.backends.threads import Crew, ThreadedWork
from loaders.dtypes import DTYPES
from loaders.errors import VerifyFailed
from loaders.presets.catalog import preset, preset_names
from loaders.quantization.kernels import Kernels, casts
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.quantization.schemes.compressed_tensors_int import GROUP_SIZES, PackedInt
from loaders.quantization.schemes.compressed_tensors_rowwise import RowScaled
from loaders.quantization.schemes.ggml import ON_DEVICE, Ggml
from loaders.quantization.schemes.mlx_affine import BITS, MlxAffine
from tests.encoding import MemorySink, MemoryView
from tests.making import Raw, weights

pytestmark = pytest.mark.engine

COLUMNS = 1024
SCHEMES: dict[str, Scheme] = {
    "nf4": Bnb4("nf4"),
    "fp4 double": Bnb4("fp4", double_quant=True),
    "int8": LlmInt8(),
    "fp8": RowScaled("float"),
    "w8a8": RowScaled("int"),
    **{f"w{bits}a16 {group}": PackedInt(bits, group) for bits in (4, 8) for group in GROUP_SIZES},
    "w4a16 asym": PackedInt(4, 128, symmetric=False),
    **{f"mlx {bits}": MlxAffine(bits, 64) for bits in BITS},
    **{name: Ggml(name) for name in ON_DEVICE},
}


def ordinary(rows: int = 64) -> np.ndarray:
    """Rows of many sizes: normal ones, halves of steps, zeros of both signs, subnormals, one-sided, with outliers."""
    rng = np.random.default_rng(7)
    values = rng.standard_normal((rows, COLUMNS)).astype(np.float32) * np.float32(0.02)
    values[0], values[1], values[2] = 0, -0.0, rng.integers(0, 2, COLUMNS) * -0.0
    values[3] = rng.integers(-8, 9, COLUMNS) / 8
    values[4] = (rng.integers(-127, 128, COLUMNS) + 0.5) / 128
    values[5] = rng.standard_normal(COLUMNS) * 1e-39
    values[6] = rng.standard_normal(COLUMNS) * 1e-37
    values[7] = rng.standard_normal(COLUMNS) * 1e-6
    values[8], values[9] = np.abs(values[8]), -np.abs(values[9])
    values[10, ::100] = 30
    values[11] = rng.standard_normal(COLUMNS) * 1e4
    values[12] = 0.75  # one value only
    values[13, ::2], values[13, 1::2] = 1, -1
    values[14] = rng.standard_t(2, COLUMNS)
    return values


def every_finite(dtype: str) -> Raw:
    """Every finite value of a dtype of 16 bits, in order, each as one group of 128, and then at random."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.uint16 if dtype == "BF16" else np.float16)
    finite = bits[np.isfinite(casts.to_float32(bits, dtype))]
    rows = np.repeat(finite, 128)
    mixed = np.random.default_rng(3).permutation(rows)
    count = rows.size // (8 * COLUMNS) * 8 * COLUMNS
    return Raw(dtype, np.concatenate([rows[:count], mixed[:count]]).reshape(-1, COLUMNS))


def stored(kernels: Kernels, scheme: Scheme, raw: Raw) -> dict[str, np.ndarray]:
    view = MemoryView(raw)
    sink = MemorySink(scheme, view.spec)
    with Crew(2) as crew:
        scheme.encode(view, sink, ThreadedWork(kernels, crew, threading.Event()))
    return sink.stored


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Kernels:
    torch = pytest.importorskip("torch")
    from loaders.quantization.kernels.torch_device import DeviceKernels

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return DeviceKernels(request.param)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_device_stores_the_bytes_of_the_cpu(name: str, dtype: str, device: Kernels) -> None:
    raw = weights(ordinary(), "F32" if dtype == "F64" else dtype)
    raw = Raw("F64", raw.data.astype(np.float64)) if dtype == "F64" else raw
    ours, theirs = (stored(kernels, SCHEMES[name], raw) for kernels in (CpuKernels(), device))
    assert [role for role in ours if ours[role].tobytes() != theirs[role].tobytes()] == []


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_device_codes_every_finite_value_as_the_cpu_does(name: str, dtype: str, device: Kernels) -> None:
    if name == "int8" and dtype == "BF16":
        pytest.skip("bfloat16s beyond float16 are refused, whatever encodes")
    raw = every_finite(dtype)
    ours, theirs = (stored(kernels, SCHEMES[name], raw) for kernels in (CpuKernels(), device))
    assert [role for role in ours if ours[role].tobytes() != theirs[role].tobytes()] == []


def test_a_device_refuses_what_float16_does_not_hold(device: Kernels) -> None:
    values = ordinary()
    values[20, 5] = 1e5
    for kernels in (CpuKernels(), device):
        with pytest.raises(VerifyFailed, match="row 20 holds a weight of magnitude 100"):
            stored(kernels, LlmInt8(), weights(values, "F32"))


def numbers(role: str, data: np.ndarray, scheme: Scheme, dtype: str) -> np.ndarray:
    """Stored numbers with one NaN for all, since a device may give it another sign; codes as they are."""
    if isinstance(scheme, Ggml):
        blocks = data.view(np.uint8).reshape(-1, DTYPES[scheme.type].size((32,))).copy()
        halves = blocks[:, :2].copy().view(np.float16)
        blocks[np.isnan(halves[:, 0]), :2] = 0xFF
        return blocks
    if isinstance(scheme, RowScaled) and scheme.type == "float" and role == "weight":
        codes = data.view(np.uint8).copy()
        codes[codes & 0x7F == 0x7F] = 0x7F
        return codes
    if role in ("weight_scale", "weight_scales", "weight_biases", "SCB", "weight.absmax"):
        kind = "F32" if role in ("SCB", "weight.absmax") else dtype
        return np.nan_to_num(casts.to_float32(data, kind), nan=7.0)
    return data


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", [name for name in SCHEMES if "double" not in name])
def test_groups_with_nan_and_infinities_are_coded_alike(name: str, dtype: str, device: Kernels) -> None:
    values = ordinary()
    values[20, 7], values[21, 100], values[22, 900], values[23, 33] = np.nan, np.inf, -np.inf, -np.nan
    values[24, 1], values[24, 2], values[25] = np.inf, -np.inf, np.nan
    scheme, raw = SCHEMES[name], weights(values, dtype)
    ours, theirs = (stored(kernels, scheme, raw) for kernels in (CpuKernels(), device))
    for role in ours:
        one, other = (numbers(role, each[role], scheme, dtype) for each in (ours, theirs))
        assert np.array_equal(one, other), role


def test_threads_share_no_buffers(device: Kernels) -> None:
    raws = [weights(ordinary() * np.float32(scale), "BF16") for scale in (0.5, 1, 2, 4, 8, 16)]

    def encode(raw: Raw) -> list[bytes]:
        x = raw.data.reshape(-1)
        packed, absmax = np.empty(x.size // 2, np.uint8), np.empty(x.size // 64, np.float32)
        for _ in range(5):
            device.encode_fourbit(x, "BF16", "nf4", 64, packed, absmax)
        return [packed.tobytes(), absmax.tobytes()]

    with Crew(3) as crew:
        assert list(crew.map(encode, raws)) == [encode(raw) for raw in raws]


def test_every_scheme_that_names_a_gpu_is_tested_here() -> None:
    named = {type(preset(name).scheme) for name in preset_names() if "cuda" in preset(name).scheme.backends}
    assert {kind.__name__ for kind in named} - {"Plain", "Ternary"} == {type(s).__name__ for s in SCHEMES.values()}
