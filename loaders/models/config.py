"""What can be asked of loading a model."""

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
    """How a model's weights come to it."""

    FULL = "full"  # all, to the device; unchanged weights stay in the files' pages where that is the CPU
    # the same, but a source's quantized weights are decoded; of several processes the first loads all to the CPU, from
    # where it can be scattered or broadcast, and the others have shapes only
    LOW_MEMORY = "low_memory"
    UNIFIED_MEMORY = "unified_memory"  # the same as full, but a source's quantized weights are decoded
    STREAMING = "streaming"  # a module's when its forward needs them

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoadingConfig:
    """How to load a model.

    strategy: a `LoadingStrategy`, or its value ("streaming"). quantize: a scheme or the name of one ("nf4"), for
    weights that are not quantized yet. decode: give quantized weights back as floats. dtype: of float weights; the
    checkpoint's by default. max_memory: bytes by device ("cpu", "cuda:0"), as a number or "8GB". attention:
    transformers' attn_implementation. workers: threads that read and encode. use_cache: keep on disk what quantize
    makes of weights, and take it from there. memory_budget_mb: streamed weights held at once, in 1e6 bytes.
    llama_pro_blocks: so many new blocks by block expansion. llama_pro_path: a checkpoint that is such an expansion
    of the model, whose weights are taken. ignore_unexpected: patterns of stored tensors that the model may have no
    place for.
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
        """max_memory in bytes.

        Raises:
            BadSpec: a size that is none.
        """
        return {device: _bytes(size, device) for device, size in (self.max_memory or {}).items()}


def _bytes(size: int | str, device: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", str(size), re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    if match is None or unit not in UNITS:
        raise BadSpec(f"max_memory: {size!r} for {device} is no size; expected bytes, or such as '8GB' or '512MiB'")
    return int(float(match[1]) * UNITS[unit])
