"""The kernels give the same bytes on every CPU, and in torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from loaders.backends import threads
from loaders.errors import BadSpec
from loaders.places import ROOT
from loaders.quantization.grid import room_terms, symmetric_terms
from loaders.quantization.kernels import Kernels, bitnet, casts, compare, cpu
from loaders.quantization.kernels.bitsandbytes import fourbit
from loaders.quantization.kernels.hqq import compare as hqq
from loaders.quantization.kernels.lanes import host_has
from loaders.quantization.kernels.mlx import affine, microfloat, microfloat_scales
from loaders.quantization.schemes.bitnet import total_magnitude
from loaders.quantization.schemes.mlx_float import SETTINGS, MlxFloat
from tests.encoding import MemoryView
from tests.making import Raw, values_of, weights
from tests.plain_cpu import differing

DTYPES = ("BF16", "F16", "F32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_any_origin_are_one_type_to_the_compiler(dtype: str) -> None:
    """So that a kernel is compiled once for a dtype, and not again where a file is read instead of mapped."""
    from numba import typeof

    bits = np.dtype({"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype])
    data = bytes(8 * bits.itemsize + 1)
    mapped, shifted = np.frombuffer(data, bits, 8), np.frombuffer(data, bits, 8, offset=1)
    own = mapped.copy()
    assert len({typeof(cpu.kernel_input(x, dtype)) for x in (mapped, shifted, own)}) == 1
    assert own.flags.writeable


def inputs(dtype: str) -> Raw:
    """Ordinary rows, zeros, subnormals, huge ones, NaN and infinities."""
    rows = np.random.default_rng(0).standard_normal((96, 256)).astype(np.float32)
    rows[0] = 0
    rows[1] *= 1e-40
    rows[2] *= 1e30
    rows[3, 7], rows[4, 9], rows[5, 200] = np.nan, np.inf, -np.inf
    rows[6] = np.round(rows[6] * 4) / 4
    with np.errstate(over="ignore"):
        return weights(rows, dtype)


def bfloat16_groups() -> np.ndarray:
    """Groups of 64 bfloat16s with a largest magnitude of every mantissa, and weights of every exponent below it."""
    tops = np.arange(128)[:, None] + np.array([0x0D80, 0x3F80, 0x4700, 0x7D80])[:, None, None]
    rng = np.random.default_rng(2)
    signs = rng.integers(0, 2, (4, 128, 64)) << 15
    near = np.maximum(tops - rng.integers(0, 1024, (4, 128, 64)), 0)
    near[..., :16] = rng.integers(0, tops + 1, (4, 128, 16))
    near[..., 5] = tops[..., 0]
    return np.asarray(near | signs, np.uint16).reshape(-1)


def results() -> dict[str, bytes]:
    """What every CPU kernel makes of the inputs."""
    kernels, found = cpu.CpuKernels(), {}
    for table in ("nf4", "fp4"):
        x = bfloat16_groups()
        packed, absmax = np.empty(x.size // 2, np.uint8), np.empty(x.size // 64, np.float32)
        kernels.encode_fourbit(x, "BF16", table, 64, packed, absmax)
        found[f"{table} of every mantissa"] = packed.tobytes() + absmax.tobytes()
    for dtype in DTYPES:
        x = inputs(dtype).data.reshape(-1)
        for table in ("nf4", "fp4"):
            for group in (32, 64, 4096):
                packed, absmax = np.empty(x.size // 2, np.uint8), np.empty(x.size // group, np.float32)
                kernels.encode_fourbit(x, dtype, table, group, packed, absmax)
                decoded, sums = np.empty(x.size, np.float32), compare.new_sums()
                fourbit.decode(packed, absmax, group, table == "fp4", decoded)
                cpu.compare_into(x, dtype, decoded, sums)
                name = f"{dtype} {table} {group}"
                found[name] = packed.tobytes() + np.nan_to_num(absmax).tobytes()
                found[name + " decoded"] = np.nan_to_num(decoded, nan=7).tobytes()
                found[name + " sums"] = sums.tobytes()
                sums = compare.new_sums()
                x_bits = cpu.kernel_input(x, dtype)
                fourbit.compare(x_bits, packed, absmax, group, table == "fp4", sums)
                found[name + " sums in registers"] = sums.tobytes()
        for bits in affine.BITS:
            x = np.delete(inputs(dtype).data, [3, 4, 5], axis=0).reshape(-1)  # without NaN and infinities
            x = x.view(np.int16) if dtype == "F16" else x
            packed, out = np.empty(x.size * bits // 8, np.uint8), np.empty(x.size, np.float32)
            scales, biases = np.empty(x.size // 64, np.float32), np.empty(x.size // 64, np.float32)
            affine.encode(x, bits, 64, packed, scales, biases)
            affine.decode(packed, scales, biases, bits, 64, out)
            sums = compare.new_sums()
            affine.compare(x, packed, scales, biases, bits, 64, sums)
            found[f"{dtype} affine {bits} sums"] = sums.tobytes()
            found[f"{dtype} affine {bits}"] = b"".join(a.tobytes() for a in (packed, scales, biases, out))
        for mode, (bits, group) in SETTINGS.items():
            x = np.append(inputs(dtype).data.reshape(-1)[:-16], bfloat16_groups() if dtype == "BF16" else [])
            x = cpu.kernel_input(x.astype(inputs(dtype).data.dtype), dtype)
            x = x[: x.size // group * group]
            codes, small = np.empty(x.size * bits // 8, np.uint8), np.empty(x.size // group, np.uint8)
            MlxFloat(mode).code(x, codes, small)
            found[f"{dtype} {mode}"] = codes.tobytes() + small.tobytes()
            sums, values = compare.new_sums(), microfloat_scales.scale_values(mode)
            terms = symmetric_terms(6, 0.25, 0.1875, False)
            microfloat.compare(x, codes, small, values, group, bits, terms, sums)
            found[f"{dtype} {mode} sums"] = sums.tobytes()
        finite = np.nan_to_num(inputs("F32").data, nan=0, posinf=1, neginf=-1)
        x = weights(np.clip(finite, -6e4, 6e4), dtype).data.reshape(-1)
        found[f"{dtype} magnitudes"] = kernels.magnitude_sums(x, dtype).tobytes()
        runs = tuple(x.reshape(4, -1)[:, :1001].copy())
        out = np.empty(1001, np.uint8)
        kernels.pack_ternary(runs, dtype, 0.7, out)  # type: ignore[arg-type]
        back = np.empty(1001, np.float32)
        bitnet.unpack(out, np.uint8(4), np.float32(0.5), back)
        sums = compare.new_sums()
        bitnet.compare(cpu.kernel_input(runs[2], dtype), out, np.uint8(4), np.float32(0.5), sums)
        found[f"{dtype} ternary"] = out.tobytes() + back.tobytes() + sums.tobytes()
        for mask in (15, 255):
            x, rng, sums = (
                cpu.kernel_input(inputs(dtype).data.reshape(-1), dtype),
                np.random.default_rng(4),
                compare.new_sums(),
            )
            codes = rng.integers(0, 256, x.size).astype(np.uint8)
            scales, zeros = (
                cpu.kernel_input(weights(rng.uniform(0.1, each, x.size // 64).astype(np.float32), dtype).data, dtype)
                for each in (1, 15)
            )
            roundings = tuple(map(np.float32, (2**-6, 2**-133, 2**-125)))
            hqq.compare_rows(x, codes, 0, mask, scales, zeros, roundings, room_terms(2**-20, True), sums)
            found[f"{dtype} hqq under {mask}"] = sums.tobytes()
        sums = compare.new_sums()
        cpu.scan_into(inputs(dtype).data.reshape(-1), dtype, sums)
        found[f"{dtype} scan"] = sums.tobytes()
        for target in DTYPES:
            found[f"{dtype} to {target}"] = casts.cast(every_size(dtype), dtype, target).tobytes()
    return found


def every_size(dtype: str) -> np.ndarray:
    """More weights than numpy casts, of every 16 bits; in float32 others below them, and all that is halfway."""
    high = np.arange(casts.FEW + 13).astype(np.uint16)
    if dtype != "F32":
        return high.view(np.float16) if dtype == "F16" else high
    low = np.random.default_rng(3).integers(0, 1 << 16, high.size, dtype=np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    return np.concatenate([high.astype(np.uint32) << 16 | low, halves, halves + 0xFFF, halves + 0x1000]).view(
        np.float32
    )


def test_a_plain_cpu_gives_the_same_bytes(tmp_path: Path) -> None:
    assert differing(results, tmp_path) == []


def test_features_are_those_that_code_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import config

    monkeypatch.setattr(config, "CPU_FEATURES", "+avx2,-fma", raising=False)
    assert host_has("avx2")
    assert not host_has("fma")
    monkeypatch.setattr(config, "CPU_FEATURES", None)
    monkeypatch.setattr(config, "CPU_NAME", "generic", raising=False)
    assert not host_has("avx2")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Kernels:
    torch = pytest.importorskip("torch")
    from loaders.quantization.kernels.torch_device import DeviceKernels

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return DeviceKernels(request.param)


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [*DTYPES, "F64"])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_torch_gives_the_same_four_bits(table: str, dtype: str, device: Kernels) -> None:
    x = inputs("F32").data.astype(np.float64).reshape(-1) if dtype == "F64" else inputs(dtype).data.reshape(-1)
    made = []
    for kernels in (cpu.CpuKernels(), device):
        packed, absmax, alone = (
            np.empty(x.size // 2, np.uint8),
            np.empty(x.size // 64, np.float32),
            np.empty(x.size // 64, np.float32),
        )
        kernels.encode_fourbit(x, dtype, table, 64, packed, absmax)
        kernels.group_absmax(x, dtype, 64, alone)
        assert np.array_equal(absmax, alone, equal_nan=True)
        made.append((packed.tobytes(), np.nan_to_num(absmax, nan=7).tobytes()))
    assert made[0] == made[1]


def halved(rows: np.ndarray) -> np.ndarray:
    while rows.shape[1] > 1:
        rows = rows[:, : rows.shape[1] // 2] + rows[:, rows.shape[1] // 2 :]
    return rows[:, 0]


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [*DTYPES, "F64"])
@pytest.mark.parametrize("size", [1, 511, bitnet.SUMMED, 3 * bitnet.SUMMED + 1234])
def test_magnitudes_are_summed_in_one_order_everywhere(size: int, dtype: str, device: Kernels) -> None:
    """Magnitudes of many sizes, whose sums in float64 are rounded, and differ by order."""
    rng = np.random.default_rng(size)
    x = weights(rng.standard_normal(size) * 2.0 ** rng.integers(-14, 13, size), dtype).data
    values = np.abs(casts.to_float32(x, dtype)).astype(np.float64)
    rows = np.pad(values, (0, -size % bitnet.SUMMED)).reshape(-1, bitnet.RUN)
    wanted = halved(halved(rows).reshape(-1, bitnet.RUNS))
    for kernels in (cpu.CpuKernels(), device):
        assert kernels.magnitude_sums(x, dtype).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("size", [1 << 16, (1 << 20) + 4])
def test_a_sum_of_magnitudes_does_not_hang_on_ranges_and_threads(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(size)
    view = MemoryView(weights((rng.standard_normal(size) * 2.0 ** rng.integers(-40, 40, size)).reshape(4, -1), "F32"))
    totals = []
    for bits in (16, 17, 21):
        monkeypatch.setattr(threads, "RANGE", 1 << bits)
        with threads.Crew(2) as crew:
            work = threads.ThreadedWork(cpu.CpuKernels(), crew, threading.Event())
            totals.append(total_magnitude(view, work))
    assert len(set(totals)) == 1


@pytest.mark.engine
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_gives_the_same_ternary(dtype: str, device: Kernels) -> None:
    values = np.random.default_rng(5).standard_normal((4, 3000)).astype(np.float32)
    x = weights(values, dtype).data
    host = cpu.CpuKernels()
    made = [np.empty(3000, np.uint8), np.empty(3000, np.uint8)]
    for kernels, out in zip((host, device), made, strict=True):
        kernels.pack_ternary(tuple(x), dtype, 1.25, out)  # type: ignore[arg-type]
    assert np.array_equal(*made)


@pytest.mark.engine
def test_a_device_that_is_not_there_is_refused() -> None:
    torch = pytest.importorskip("torch")
    from loaders.backends import kernels_of

    for name, is_there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not is_there:
            with pytest.raises(BadSpec, match=f"backend={name}: torch .* finds no such device here"):
                kernels_of(name)


@pytest.mark.gpu
@pytest.mark.engine
def test_a_real_device_gives_the_same_bytes() -> None:
    torch = pytest.importorskip("torch")
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if name is None:
        pytest.skip("no CUDA or MPS device here")
    from loaders.backends import kernels_of

    for dtype in DTYPES:
        x = weights(np.random.default_rng(5).standard_normal((64, 4096)), dtype).data.reshape(-1)
        made = []
        for kernels in (cpu.CpuKernels(), kernels_of(name)):
            packed, absmax = np.empty(x.size // 2, np.uint8), np.empty(x.size // 64, np.float32)
            kernels.encode_fourbit(x, dtype, "nf4", 64, packed, absmax)
            made.append(packed.tobytes() + absmax.tobytes())
        assert made[0] == made[1]


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_casts_by_vectors_round_as_numpy_does_and_keep_what_nan_carry(source: str, target: str) -> None:
    raw = every_size(source)
    made, values = casts.cast(raw, source, target), values_of(Raw(source, raw))
    is_nan, bits = np.isnan(values), raw.view(np.uint32 if source == "F32" else np.uint16).astype(np.uint32)
    with np.errstate(over="ignore"):
        assert made[~is_nan].tobytes() == weights(values[~is_nan], target).data.tobytes()
    if source == target:
        return
    wide = {"BF16": bits << 16, "F16": (bits & 0x8000) << 16 | (bits & 0x3FF) << 13 | 0x7F800000, "F32": bits}[source]
    half = np.maximum(wide >> 13 & 0x3FF, 1) | 0x7C00 | wide >> 16 & 0x8000
    wanted = {"BF16": np.full(wide.size, 0x7FC0), "F16": half, "F32": wide}[target]
    found = made.view(np.uint32 if target == "F32" else np.uint16)
    assert is_nan.any()
    assert np.array_equal(found[is_nan], wanted[is_nan])


@pytest.mark.parametrize("source", [*DTYPES, "F64"])
@pytest.mark.parametrize("target", [*DTYPES, "F64"])
@pytest.mark.engine
def test_casts_round_as_torch_does(source: str, target: str) -> None:
    torch = pytest.importorskip("torch")
    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    values = np.random.default_rng(0).standard_normal(2000) * np.logspace(-9, 6, 2000)
    tensor = torch.from_numpy(values).to(names[source])
    raw = tensor.view(torch.uint16).numpy() if source == "BF16" else tensor.numpy()
    wanted = tensor.to(names[target])
    made = casts.cast(raw, source, target)
    assert np.array_equal(made, wanted.view(torch.uint16).numpy() if target == "BF16" else wanted.numpy())


CASTING = """
import numpy as np
from loaders.quantization.kernels.casts import cast
from loaders.quantization.kernels.compiling import compiling
told = []
with compiling(lambda: told.append(1)):
    cast(np.ones(8, np.float32), "F32", "BF16")
print(bool(told))
"""


def compiles(folder: Path, **variables: str) -> bool:
    """Whether a process that begins in a folder with a copy of loaders/ compiles a kernel."""
    environment = {**os.environ, **variables}
    ran = subprocess.run(
        [sys.executable, "-c", CASTING], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return ran.stdout == "True\n"


def copy_loaders(folder: Path) -> Path:
    shutil.copytree(ROOT / "loaders", folder / "loaders", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "WEIGHTMILL_CACHE"])
def test_code_that_was_sent_to_a_cluster_keeps_its_kernels_for_the_next_one(variable: str, tmp_path: Path) -> None:
    """Ray unpacks it into another folder in each of its sessions."""
    one, other = (copy_loaders(tmp_path / session / "_ray_pkg_0123abcd") for session in ("session_1", "session_2"))
    kept = {"NUMBA_CACHE_DIR": "", "PYTHONPATH": "", variable: str(tmp_path / "cache")}
    assert [compiles(one, **kept), compiles(other, **kept)] == [True, False]
    assert list((tmp_path / "cache").rglob("sent/loaders/quantization/kernels/*.nbi"))


def test_a_kernel_is_compiled_anew_after_a_change_to_what_it_uses(tmp_path: Path) -> None:
    """An upgrade changes files that kernels share, and leaves what numba had compiled before beside them."""
    copy_loaders(tmp_path)
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert [compiles(tmp_path, **kept) for _ in range(2)] == [True, False]
    for entry in (tmp_path / "cache").rglob("*.nb[ic]"):  # damaged ones count as absent
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert [compiles(tmp_path, **kept) for _ in range(2)] == [True, False]
    with (tmp_path / "loaders/quantization/kernels/lanes.py").open("a") as lanes:
        lanes.write("# changed\n")
    assert [compiles(tmp_path, **kept) for _ in range(2)] == [True, False]
