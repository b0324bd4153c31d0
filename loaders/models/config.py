"""The settings of loading a model, validated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from loaders.errors import BadSpec
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.quantization.schemes.hqq import Hqq
from loaders.quantization.schemes.mlx_affine import MlxAffine

SCHEMES: dict[str, Scheme] = {
    "nf4": Bnb4("nf4"),
    "fp4": Bnb4("fp4"),
    "int8": LlmInt8(),
    "hqq8": Hqq(8),
    "hqq4": Hqq(4),
    "hqq3": Hqq(3),
    "hqq2": Hqq(2),
    "mlx_int4": MlxAffine(4, 64),
    "mlx_int8": MlxAffine(8, 64),
}
BACKENDS = ("auto", "cpu", "cuda", "mps", "mlx")
DTYPES = ("float32", "float16", "bfloat16")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class LoadingStrategy(Enum):
    """The way in which a model gets its weights.

    FULL: all weights are loaded to the device; on the CPU, unchanged weights are memory maps of the files.
    LOW_MEMORY: like FULL, but quantized weights of the source are decoded; of several processes, only the first loads
    the weights, to the CPU, to scatter or broadcast them, and the others have meta tensors.
    UNIFIED_MEMORY: like FULL, but quantized weights of the source are decoded.
    STREAMING: a module's weights are loaded when its forward needs them, and freed after it.
    """

    FULL = "full"
    LOW_MEMORY = "low_memory"
    UNIFIED_MEMORY = "unified_memory"
    STREAMING = "streaming"

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoadingConfig:
    """The settings of loading a model.

    strategy: a `LoadingStrategy`, or its value ("streaming"). quantize: a scheme or the name of one ("nf4"), for
    weights that are not quantized yet. decode: whether quantized weights are decoded to floats. dtype: of float
    weights; the checkpoint's by default. max_memory: bytes by device ("cpu", "cuda:0"), as a number or "8GB".
    attention: transformers' attn_implementation. workers: the number of threads that read and encode. use_cache: keep
    encoded weights on disk for the next load. memory_budget_mb: the limit of streamed weights held at once, in 1e6
    bytes. llama_pro_blocks: the number of blocks to add by block expansion. llama_pro_path: a checkpoint that is such
    an expansion of the model, to load instead of it. ignore_unexpected: regular expressions for stored tensors that
    the model need not have.

    Raises:
        BadSpec: settings are unknown, wrong or contradict each other; all at once.
    """

    backend: str = "auto"
    strategy: LoadingStrategy | str = LoadingStrategy.FULL
    quantize: Scheme | str | None = None
    decode: bool = False
    dtype: str | None = None
    max_memory: Mapping[str, int | str] | None = None
    attention: str | None = None
    workers: int | None = None
    use_cache: bool = False
    memory_budget_mb: float = 2000.0
    llama_pro_blocks: int = 0
    llama_pro_path: str | Path | None = None
    ignore_unexpected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.strategy, LoadingStrategy):
            known = {each.value: each for each in LoadingStrategy}
            if str(self.strategy).lower() in known:
                object.__setattr__(self, "strategy", known[str(self.strategy).lower()])
            else:
                problems.append(f"strategy: unknown {self.strategy!r}; known: {', '.join(known)}")
        if self.backend not in BACKENDS:
            problems.append(f"backend: unknown {self.backend!r}; known: {', '.join(BACKENDS)}")
        if isinstance(self.quantize, str) and self.quantize not in SCHEMES:
            problems.append(f"quantize: unknown {self.quantize!r}; known: {', '.join(SCHEMES)}, or a scheme")
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"dtype: unknown {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.decode and self.quantize is not None:
            problems.append("decode: it belongs to quantized weights as floats, quantize to the other way: give one")
        if self.quantize is not None and self.strategy is LoadingStrategy.STREAMING:
            problems.append(
                "quantize: with strategy=streaming weights leave after each forward, and would be encoded anew before"
                " the next; quantize the checkpoint once and stream that (it is decoded on the way), or give another"
                " strategy"
            )
        if self.workers is not None and self.workers < 1:
            problems.append(f"workers: expected at least 1, found {self.workers}")
        if self.memory_budget_mb <= 0:
            problems.append(f"memory_budget_mb: expected more than 0, found {self.memory_budget_mb}")
        if self.llama_pro_blocks and self.llama_pro_path is not None:
            problems.append("llama_pro_path: its blocks are there already; give it or llama_pro_blocks")
        if problems:
            raise BadSpec(problems)

    @property
    def scheme(self) -> Scheme | None:
        return SCHEMES[self.quantize] if isinstance(self.quantize, str) else self.quantize

    @property
    def limits(self) -> dict[str, int]:
        """`max_memory` in bytes, by device.

        Raises:
            BadSpec: a value is not a size.
        """
        return {device: _bytes(size, device) for device, size in (self.max_memory or {}).items()}


def _bytes(size: int | str, device: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", str(size), re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    if match is None or unit not in UNITS:
        raise BadSpec(f"max_memory: {size!r} for {device} is no size; expected bytes, or such as '8GB' or '512MiB'")
    return int(float(match[1]) * UNITS[unit])
