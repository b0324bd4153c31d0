"""The rows of `weightmill bench kernels` for ggml's tensor types: our encoding and measuring, and ggml's C code.

K-quants take seconds for a large weight, so they are timed on a part of the rows, and the seconds are multiplied.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.kernels.measuring import measuring
from jobs.benchmarks.timing import Case, on_threads
from loaders.containers.gguf import TYPE_IDS
from loaders.dtypes import DTYPES
from loaders.quantization.kernels.ggml.encode import ENCODERS
from loaders.quantization.kernels.ggml.weighted import encode_weighted
from loaders.quantization.schemes.ggml import Ggml

PART = 16  # the slow types are timed on one sixteenth of the rows
WHOLE = ("Q8_0", "Q4_0", "Q5_1", "TQ2_0", "MXFP4")
IN_PART = ("Q4_K", "Q6_K", "Q3_K")
BY_IMPORTANCE = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS")


def rows(weight: np.ndarray, threads: int) -> Iterator[Case]:
    """Yield our cases, encoding and measuring, and ggml's own. `weight` is a matrix of bfloat16 bits (R, C)."""
    library = _library()
    for name in (*WHOLE, *IN_PART):
        parts = 1 if name in WHOLE else PART
        some = weight[: max(1, weight.shape[0] // parts)]
        times, said = weight.shape[0] / some.shape[0], "" if parts == 1 else f" (a {PART}th, times {PART})"
        if some.shape[1] % DTYPES[name].block:
            yield Case(f"ggml {name}, bf16", None, f"rows do not divide into blocks of {DTYPES[name].block}")
            continue
        ours = f"ggml {name}, bf16{said}"
        out = np.empty(DTYPES[name].size(some.shape), np.uint8)
        yield Case(ours, _timed(partial(_encode, some, name, out, threads), times))
        measure = _times(measuring(some, Ggml(name), threads), times)
        yield Case(f"ggml {name} decode + compare (measuring){said}", measure, after=ours)
        call = None if library is None else _timed(_peer(library, some, name, threads), times)
        yield Case(f"ggml's C, {name}, fp32", call, "" if call else "not installed: llama_cpp", ours)
    yield from _by_importance(weight[: max(1, weight.shape[0] // PART)], weight.shape[0], library, threads)


def _by_importance(some: np.ndarray, rows: int, library: Any, threads: int) -> Iterator[Case]:
    """Yield the types that an importance matrix changes, on some of the rows."""
    times, importance = rows / some.shape[0], np.random.default_rng(1).lognormal(0, 1.5, (1, some.shape[1]))
    importance = importance.astype(np.float32)
    for name in BY_IMPORTANCE:
        if some.shape[1] % DTYPES[name].block:
            continue
        ours = f"ggml {name} by importances, bf16 (a {PART}th, times {PART})"
        out = np.empty(DTYPES[name].size(some.shape), np.uint8)
        yield Case(ours, _timed(partial(_encode_by, some, name, importance, out, threads), times))
        call = None if library is None else _timed(_peer(library, some, name, threads, importance), times)
        yield Case(f"ggml's C, {name} by importances, fp32", call, "" if call else "not installed: llama_cpp", ours)


def _timed(call: Callable[[], object], times: float) -> Callable[[], float]:
    def seconds() -> float:
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * times

    return seconds


def _times(call: Callable[[], float], times: float) -> Callable[[], float]:
    return lambda: call() * times


def _spread(body: Callable[[int, int], object], count: int, threads: int) -> None:
    """Call the body for ranges of rows, each on a thread of its own."""
    edges = [count * i // threads for i in range(threads)] + [count]
    on_threads(threads, body, edges[:-1], edges[1:])


def _encode(weight: np.ndarray, name: str, out: np.ndarray, threads: int) -> None:
    size = DTYPES[name].size((1, weight.shape[1]))
    _spread(lambda a, b: ENCODERS[name](weight[a:b].reshape(-1), out[a * size : b * size]), weight.shape[0], threads)


def _encode_by(weight: np.ndarray, name: str, importance: np.ndarray, out: np.ndarray, threads: int) -> None:
    columns = weight.shape[1]
    size = DTYPES[name].size((1, columns))

    def part(a: int, b: int) -> None:
        taken = weight[a:b].reshape(-1), "BF16", name, a * columns
        encode_weighted(*taken, weight.shape[0], importance, out[a * size : b * size])

    _spread(part, weight.shape[0], threads)


def _library() -> Any:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return None
    base = next(iter(sorted(Path(found.origin).parent.rglob("libggml-base.*"))), None)
    if base is None:
        return None
    quantize = ctypes.CDLL(str(base)).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return quantize


def _peer(
    quantize: Any, weight: np.ndarray, name: str, threads: int, importance: np.ndarray | None = None
) -> Callable[[], object]:
    """Return ggml's encoder as a call, with the importances of input channels or without.

    It takes float32, and the conversion from bfloat16 is not timed.
    """
    # bfloat16 is the upper half of a float32.
    values = (weight.astype(np.uint32) << 16).view(np.float32)
    out = np.empty(DTYPES[name].size(weight.shape), np.uint8)

    def call() -> None:
        def part(first: int, last: int) -> None:
            start, by = first * weight.shape[1], None if importance is None else importance.ctypes.data
            quantize(TYPE_IDS[name], values.ctypes.data, out.ctypes.data, start, last - first, weight.shape[1], by)

        _spread(part, weight.shape[0], threads)

    return call
