"""`weightmill bench kernels`: encoders and decoders on one weight, in rotation with those of other libraries.

GB/s are 1e9 bytes of bfloat16 input per second (2 bytes per weight), whatever dtype a case takes. A library that is not
installed, or does not work, is a row that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jobs.benchmarks.busy_machine import Busy
from jobs.benchmarks.kernels import compressed_tensors, ggml, hqq, mlx
from jobs.benchmarks.kernels.measuring import measuring
from jobs.benchmarks.random_llama import random_bf16
from jobs.benchmarks.table import cases_said
from jobs.benchmarks.timing import Case, on_threads, rotate
from jobs.cli.verb import Said, note
from loaders.quantization.kernels import cpu
from loaders.quantization.kernels.bitsandbytes import int8
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4


def time_kernels(rows: int, columns: int, threads: int, repeats: int) -> Said:
    """Time encoders and decoders on one random bfloat16 weight (rows, columns)."""
    weight = random_bf16(np.random.default_rng(0), rows * columns).reshape(rows, columns)
    cases = [
        *_ours(weight, threads),
        *_peers(weight, threads),
        *(Case(*row) for row in hqq.rows(weight, threads)),
    ]
    cases += ggml.rows(weight, threads)
    cases += compressed_tensors.rows(weight, threads)
    note(f"timing {len(cases)} cases, {repeats} laps each; the libraries take a few seconds a lap")
    busy = Busy()
    rotate(cases, repeats)
    return cases_said(cases, weight.nbytes, busy, {"shape": [rows, columns], "threads": threads, "repeats": repeats})


def _ours(weight: np.ndarray, threads: int) -> Iterator[Case]:
    flat, host = weight.reshape(-1), cpu.CpuKernels()
    packed, absmax = np.empty(flat.size // 2, np.uint8), np.empty(flat.size // 64, np.float32)
    half = ((flat.astype(np.uint32) << 16).view(np.float32)).astype(np.float16)
    single, target = half.astype(np.float32), np.empty_like(flat)
    codes, scales, columns = np.empty(flat.size, np.int8), np.empty(weight.shape[0], np.float32), weight.shape[1]
    quarter = flat.size // 4
    thirds = np.empty(quarter, np.uint8)

    def spread(body: Callable[[int, int], object], count: int) -> None:
        # Ranges begin at multiples of 64, so that no group of weights is cut.
        edges = [count * i // threads // 64 * 64 for i in range(threads)] + [count]
        on_threads(threads, body, edges[:-1], edges[1:])

    def four(x: np.ndarray, dtype: str, table: str) -> Callable[[], None]:
        def part(a: int, b: int) -> None:
            host.encode_fourbit(x[a:b], dtype, table, 64, packed[a // 2 : b // 2], absmax[a // 64 : b // 64])

        return lambda: spread(part, x.size)

    def eight(x: np.ndarray) -> Callable[[], None]:
        def part(a: int, b: int) -> None:
            taken = cpu.kernel_input(x[a * columns : b * columns], "F16" if x.dtype == np.float16 else "BF16")
            int8.encode_int8(taken, columns, codes[a * columns : b * columns], scales[a:b])

        return lambda: spread(part, weight.shape[0])

    def three() -> None:
        total: list[float] = []
        spread(lambda a, b: total.extend(host.magnitude_sums(flat[a:b], "BF16")), flat.size)
        inverse = flat.size / sum(total)

        def part(a: int, b: int) -> None:
            runs = tuple(flat[k * quarter + a : k * quarter + b] for k in range(4))
            host.pack_ternary(runs, "BF16", inverse, thirds[a:b])  # type: ignore[arg-type]

        spread(part, quarter)

    yield Case("copy (np.copyto)", lambda: spread(lambda a, b: np.copyto(target[a:b], flat[a:b]), flat.size))
    yield Case("nf4, bf16", four(flat, "BF16", "nf4"))
    yield Case("nf4, fp16", four(half, "F16", "nf4"))
    yield Case("nf4, fp32", four(single, "F32", "nf4"))
    yield Case("fp4, bf16", four(flat, "BF16", "fp4"))
    yield Case("int8, bf16", eight(flat))
    yield Case("int8, fp16", eight(half))
    yield Case("nf4 decode + compare (measuring)", measuring(weight, Bnb4("nf4"), threads), after="nf4, bf16")
    yield Case("ternary, bf16", three)
    yield from mlx.ours(weight, threads, spread)


def _peers(weight: np.ndarray, threads: int) -> Iterator[Case]:
    torch = _library("torch")
    tensor: Any = torch.from_numpy(weight).view(torch.bfloat16) if torch else None
    if torch:
        torch.set_num_threads(threads)
    functional: Any = (
        _library("bitsandbytes.functional") if torch and importlib.util.find_spec("bitsandbytes") else None
    )
    for table, beside in (("nf4", "nf4, bf16"), ("fp4", "fp4, bf16")):
        call = None
        if functional:
            call = lambda table=table: functional.quantize_4bit(tensor, blocksize=64, quant_type=table)  # noqa: E731
        yield Case(f"bitsandbytes {table}, bf16", call, "" if call else "not installed: bitsandbytes", beside)
    for name, beside in (("bf16", "int8, bf16"), ("fp16", "int8, fp16")):
        call = None
        if functional:
            taken = tensor if name == "bf16" else tensor.half()
            call = lambda taken=taken: functional.int8_vectorwise_quant(taken.half())  # noqa: E731
        yield Case(f"bitsandbytes int8, {name}", call, "" if call else "not installed: bitsandbytes", beside)
    state: list[Any] = []

    def measure() -> Any:
        if not state:
            state.append(functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4"))
        back = functional.dequantize_4bit(*state[0])
        error = tensor.float() - back.float()
        flat = (tensor.float().flatten(), back.float().flatten())
        return error.square().mean(), error.abs().max(), torch.nn.functional.cosine_similarity(*flat, dim=0)

    beside = "nf4 decode + compare (measuring)"
    missing = "" if functional else "not installed: bitsandbytes"
    yield Case("bitsandbytes dequantize + torch errors", measure if functional else None, missing, beside)

    def three() -> Any:
        values = tensor.float()
        codes = (values * (1 / values.abs().mean().clamp(min=1e-5))).round().clamp(-1, 1).to(torch.int8) + 1
        quarters = codes.to(torch.uint8).reshape(4, -1)
        return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6

    missing = "" if torch else "not installed: torch"
    yield Case("torch, ternary by its definition", three if torch else None, missing, "ternary, bf16")
    yield from mlx.peers(weight, _library("mlx.core"))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    # A library that is not installed, or does not load, becomes a row of the table.
    except ImportError:
        return None
