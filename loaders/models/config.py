"""The settings of loading a model, validated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from loaders.errors import BadSpec
from loaders.faults import not_positive
from loaders.near_misses import meant, near, unknown_quant, unknown_setting
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

    def __new__(cls, **settings: Any) -> ModelLoadingConfig:
        """Refuse unknown settings in words; Python's own error would not say what was meant."""
        known = [each.name for each in fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise BadSpec([f"{name}: {_no_setting(name, settings[name], known)}" for name in unknown])
        return object.__new__(cls)

    def __post_init__(self) -> None:
        if type(self.dtype).__module__ == "torch":
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        problems = self._wrong_types()
        if problems:
            raise BadSpec(problems)
        if not isinstance(self.strategy, LoadingStrategy):
            known = {each.value: each for each in LoadingStrategy}
            if str(self.strategy).lower() in known:
                object.__setattr__(self, "strategy", known[str(self.strategy).lower()])
            else:
                hint = near(str(self.strategy), known)
                problems.append(f"strategy: unknown {self.strategy!r}{hint}; known: {', '.join(known)}")
        if self.backend not in BACKENDS:
            # A device's number is no part of a backend.
            hint = near(self.backend.partition(":")[0], BACKENDS) or near(self.backend, BACKENDS)
            problems.append(f"backend: unknown {self.backend!r}{hint}; known: {', '.join(BACKENDS)}")
        if isinstance(self.quantize, str) and self.quantize not in SCHEMES:
            problems.append(f"quantize: {_no_scheme(self.quantize)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"dtype: unknown {self.dtype!r}{near(str(self.dtype), DTYPES)}; known: {', '.join(DTYPES)}")
        if self.decode and self.quantize is not None:
            problems.append("decode: it belongs to quantized weights as floats, quantize to the other way: give one")
        if self.quantize is not None and self.strategy is LoadingStrategy.STREAMING:
            problems.append(
                "quantize: with strategy=streaming weights leave after each forward, and would be encoded anew before"
                " the next; quantize the checkpoint once and stream that (it is decoded on the way), or give another"
                " strategy"
            )
        if self.llama_pro_blocks and self.llama_pro_path is not None:
            problems.append("llama_pro_path: its blocks are there already; give it or llama_pro_blocks")
        if problems:
            raise BadSpec(problems)

    def _wrong_types(self) -> list[str]:
        problems = [not_positive("memory_budget_mb", self.memory_budget_mb)]
        if self.workers is not None:
            problems.append(not_positive("workers", self.workers, whole=True, least=1))
        if not isinstance(self.backend, str):
            problems.append(f"backend: expected one of {', '.join(BACKENDS)}, found {self.backend!r}")
        if not (self.quantize is None or isinstance(self.quantize, str) or hasattr(self.quantize, "engine")):
            problems.append(f"quantize: expected a preset's name, such as 'nf4', or a scheme; found {self.quantize!r}")
        if not (self.max_memory is None or isinstance(self.max_memory, Mapping)):
            problems.append(f"max_memory: expected such as {{'cpu': '8GB'}}, found {self.max_memory!r}")
        if isinstance(self.llama_pro_blocks, bool) or not isinstance(self.llama_pro_blocks, int):
            problems.append(f"llama_pro_blocks: expected a whole number, found {self.llama_pro_blocks!r}")
        return [problem for problem in problems if problem is not None]

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


def _no_setting(name: str, value: object, known: Sequence[str]) -> str:
    """Say what to give instead of a setting that there is not."""
    if name in ("load_in_4bit", "load_in_8bit"):
        return f"no such setting; give quantize={'nf4' if name == 'load_in_4bit' else 'int8'!r}"
    if name in ("device", "device_map", "map_location"):
        where = str(value).partition(":")[0]
        where = where if where in BACKENDS else meant(where, BACKENDS) or "auto"
        known = ", ".join(BACKENDS)
        return f"no such setting; give backend={where!r} (known: {known}), or max_memory to share a model out"
    return unknown_setting(name, known)


def _no_scheme(name: str) -> str:
    """Say which schemes models are quantized to here; of a preset that is none of them, who makes it."""
    from loaders.presets.catalog import preset_names

    if name in preset_names():
        return (
            f"{name!r} is not one that a model is quantized to as it is loaded; known: {', '.join(SCHEMES)}. A job"
            " (weightmill run) writes it, and the engine loads that"
        )
    return f"{unknown_quant(name, SCHEMES)}, or a scheme"


def _bytes(size: int | str, device: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", str(size), re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    if match is None or unit not in UNITS:
        raise BadSpec(f"max_memory: {size!r} for {device} is no size; expected bytes, or such as '8GB' or '512MiB'")
    return int(float(match[1]) * UNITS[unit])
