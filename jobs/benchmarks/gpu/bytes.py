"""Part `bytes` of `weightmill bench gpu`: the bytes of a device's encoders compared with the CPU's and bitsandbytes'.

Of searches, which may find other codes there, it is the errors that are compared.
"""

from __future__ import annotations

import importlib.util
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jobs.benchmarks.gpu.trials import Bench, Found, Trial
from loaders.backends.threads import Crew, ThreadedWork
from loaders.dtypes import DTYPES
from loaders.errors import VerifyFailed
from loaders.presets.catalog import preset, preset_names
from loaders.quantization.kernels import Kernels, casts
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.quantization.measure import measure
from loaders.quantization.memory_parts import MemoryParts
from loaders.quantization.scheme import Block, Scheme, searched_on
from loaders.quantization.schemes.plain import Plain
from loaders.specs import TensorSpec

ROWS = 64
WEIGHTS = 1 << 18
WHOLE = ROWS * 128  # weights that make rows of whole groups, for all presets
SEVERAL_RANGES = 1 << 22
REPEATS = 64  # how often every finite value occurs, as one group of that size
STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
# Settings of presets that change the device's work, by the scheme's kind.
VARIED: dict[str, dict[str, tuple[Any, ...]]] = {
    "bnb4": {"group_size": (64, 128, 4096), "double_quant": (False, True)},
    "packed_int": {"group_size": (32, 128)},
    "mlx": {"group_size": (32, 128)},
}
FIRST = "nf4"
SHOWN = 3
MOST_WORSE = 1e-3  # how much the error of a search may be off from the CPU's, of itself
OUTLIERS = 1e-3  # the share of weights that are made fifty times as large


@dataclass(frozen=True)
class InMemory:
    """A `View` of an array in memory."""

    spec: TensorSpec
    data: np.ndarray

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        return self.data[start:stop]


def device_presets() -> list[str]:
    """Return the presets whose scheme has an encoder in torch. Those that only copy have none, and are left out."""
    schemes = {name: preset(name).scheme for name in preset_names()}
    found = [n for n, scheme in schemes.items() if "cuda" in scheme.backends and not isinstance(scheme, Plain)]
    return sorted(found, key=lambda name: name != FIRST)


def searched_presets() -> list[str]:
    """Return the presets whose scheme searches for its codes on a GPU."""
    return [name for name in preset_names() if "cuda" in searched_on(preset(name).scheme)]


def variants(name: str) -> dict[str, Scheme]:
    """Return a preset's scheme with every combination of the settings in VARIED, by a description."""
    settings = VARIED.get(preset(name).scheme.kind, {})
    each = [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]
    return {
        " ".join([name, *(f"{key}={value}" for key, value in chosen.items())]): preset(name, **chosen).scheme
        for chosen in each
    }


def inputs(dtype: str) -> dict[str, np.ndarray]:
    """Return weights (n,) of several kinds: normal ones, ends of the range, ties, and every finite value."""
    rng = np.random.default_rng(1)
    made = {
        "normal": rng.standard_normal(SEVERAL_RANGES) * 0.02,
        "student": rng.standard_t(3, WEIGHTS) * 0.02,
        "ties": rng.integers(-7, 8, WEIGHTS) / 8.0,
        "zeros of both signs": rng.integers(0, 2, WEIGHTS) * -0.0,
    }
    if dtype != "F16":  # float16 has no such numbers.
        made["subnormal"] = rng.standard_normal(WEIGHTS) * 1e-39
        made["tiny"] = rng.standard_normal(WEIGHTS) * 1e-37
        made["huge"] = rng.standard_normal(WEIGHTS) * 1e37
    found = {kind: casts.cast(values.astype(np.float32), "F32", dtype) for kind, values in made.items()}
    if dtype != "F32":
        every = np.arange(1 << 16, dtype=np.uint16).view(STORAGE[dtype])
        finite = every[np.isfinite(casts.to_float32(every, dtype))]
        # Repeated from the beginning, they fill rows of whole groups.
        found["every finite value, in order"] = np.resize(
            np.repeat(finite, REPEATS), -(-finite.size * REPEATS // WHOLE) * WHOLE
        )
        found["every finite value, mixed"] = rng.permutation(found["every finite value, in order"])
    return found


def stored_by(kernels: Kernels, scheme: Scheme, view: InMemory) -> dict[str, np.ndarray]:
    """Encode a tensor with some kernels; returns the stored parts by role."""
    sink = MemoryParts(scheme.stored(view.spec))
    with Crew(1) as crew:
        scheme.encode(view, sink, ThreadedWork(kernels, crew, threading.Event()))
    return sink.parts()


def _stored_or_refused(kernels: Kernels, scheme: Scheme, view: InMemory) -> dict[str, np.ndarray]:
    """Return the stored parts; for weights that the scheme refuses, the refusal, which is to be the same as well."""
    try:
        return stored_by(kernels, scheme, view)
    except VerifyFailed as error:
        return {"the refusal": np.frombuffer(str(error).encode(), np.uint8)}


def trials(bench: Bench) -> Iterator[Trial]:
    """Yield a trial for each preset and dtype, and one for each table of bitsandbytes."""
    from loaders.quantization.kernels.torch_device import DeviceKernels

    device = DeviceKernels(bench.device)
    for dtype in STORAGE:
        given = inputs(dtype)
        for name in device_presets():
            yield Trial(f"{name}, {dtype}", partial(_compared, device, name, dtype, given))
    for name in searched_presets():
        yield Trial(f"{name}, error", partial(_errors, device, name))
    for table in ("nf4", "fp4"):
        yield Trial(f"bitsandbytes' own {table} on {bench.device}, BF16", partial(_bitsandbytes, bench, table))


def _compared(device: Kernels, name: str, dtype: str, given: dict[str, np.ndarray]) -> Found:
    host, differing, cases = CpuKernels(), [], 0
    for said, scheme in variants(name).items():
        for kind, data in given.items():
            view = InMemory(TensorSpec("w.weight", DTYPES[dtype], (ROWS, data.size // ROWS)), data)
            ours, theirs = (_stored_or_refused(kernels, scheme, view) for kernels in (host, device))
            cases += 1
            for role, wanted in ours.items():
                found = theirs.get(role)
                if found is None or found.nbytes != wanted.nbytes:
                    wrong = wanted.nbytes
                else:
                    wrong = int(np.count_nonzero(wanted.view(np.uint8) != found.view(np.uint8)))
                if wrong:
                    differing.append(f"{said}, {kind}: {wrong} of {wanted.nbytes} bytes of {role}")
    weights = len(variants(name)) * sum(data.size for data in given.values())
    numbers = {"cases": cases, "weights": weights, "differing_cases": len(differing)}
    if differing:
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        return Found(numbers, fault=f"{len(differing)} of {cases} cases differ: {'; '.join(differing[:SHOWN])}{more}")
    return Found(numbers, f"all bytes equal: {cases} cases, {weights:,} weights")


def _errors(device: Kernels, name: str) -> Found:
    """Compare the errors of a search, on normal weights and on some with outliers."""
    scheme, rng = preset(name).scheme, np.random.default_rng(3)
    normal = rng.standard_normal(SEVERAL_RANGES).astype(np.float32) * np.float32(0.02)
    outlying = np.where(rng.random(SEVERAL_RANGES) < OUTLIERS, normal * np.float32(50), normal)
    worst = 0.0
    for values in (normal, outlying):
        data = casts.cast(values, "F32", "BF16")
        view = InMemory(TensorSpec("w.weight", DTYPES["BF16"], (ROWS, data.size // ROWS)), data)
        ours, theirs = (_error(kernels, scheme, view) for kernels in (CpuKernels(), device))
        worst = max(worst, abs(theirs / ours - 1))
    said = f"at most {worst:.2g} of the CPU's error apart"
    return Found({"apart": worst}, said, fault=said if worst > MOST_WORSE else "")


def _error(kernels: Kernels, scheme: Scheme, view: InMemory) -> float:
    """Return the relative error of what some kernels find, by the CPU's decoder."""
    parts = MemoryParts(scheme.stored(view.spec))
    with Crew(1) as crew:
        scheme.encode(view, parts, ThreadedWork(kernels, crew, threading.Event()))
        work = ThreadedWork(CpuKernels(), crew, threading.Event())
        return measure(view, scheme, view.spec, parts, work, lambda count: None).relative_error


def _bitsandbytes(bench: Bench, table: str) -> Found:
    """Count the differences between bitsandbytes' kernel and ours. It may round differently, so they are no fault."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return Found(said="not installed")
    import torch
    from bitsandbytes import functional

    data = inputs("BF16")["normal"]
    scheme = variants(table)[f"{table} group_size=64 double_quant=False"]
    view = InMemory(TensorSpec("w.weight", DTYPES["BF16"], (ROWS, data.size // ROWS)), data)
    ours = stored_by(CpuKernels(), scheme, view)
    tensor = torch.from_numpy(data).view(torch.bfloat16).to(bench.device)
    theirs, state = functional.quantize_4bit(tensor, blocksize=64, quant_type=table)
    codes = int(np.count_nonzero(theirs.cpu().numpy().reshape(-1) != ours["weight"]))
    scales = int(np.count_nonzero(state.absmax.float().cpu().numpy() != ours["weight.absmax"]))
    said = f"{codes} of {ours['weight'].size:,} bytes of codes and {scales} scales differ from ours"
    return Found({"weights": data.size, "differing_codes": codes, "differing_scales": scales}, said)
