"""The settings of loading a model, validated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum, StrEnum
from inspect import signature
from pathlib import Path
from typing import Any

from loaders.errors import BadSpec
from loaders.faults import not_positive
from loaders.models.quantization_config import (
    COMPUTES_ALONE,
    DTYPES,
    PLAIN,
    QuantizationConfig,
    Quantize,
    name_of_dtype,
    scheme_of,
    wrong_quantization,
)
from loaders.near_misses import meant, near, unknown_setting
from loaders.quantization.scheme import Scheme

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
# Settings that have two names: a short one of ours, and that of trainers, under which the value is kept.
NAMES = {
    "strategy": "loading_strategy",
    "quantize": "quantization_config",
    "workers": "loading_workers",
    "attention": "attn_implementation",
}
CHOSEN = -1  # of loading_workers: as many threads as this process may use CPUs


class Backend(StrEnum):
    """What a model computes with. AUTO is this machine's GPU, if it has one, and MLX for a checkpoint of MLX's."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"
    MLX = "mlx"


BACKENDS = tuple(each.value for each in Backend)
APPLES = (Backend.MPS, Backend.MLX)


class LoadingStrategy(Enum):
    """The way in which a model gets its weights. Each takes weights that are quantized, or quantizes them on the way.

    FULL: all weights are loaded to the device; on the CPU, unchanged weights are memory maps of the files.
    LOW_MEMORY: of several processes, only the first loads or quantizes the weights, to the CPU, to scatter or broadcast
    them, and the others have meta tensors. One process alone loads them to its device, as FULL.
    UNIFIED_MEMORY: for devices that share the CPU's memory; MLX then reads weights when they are first used.
    STREAMING: a module's weights are loaded when its forward needs them, and freed after it.
    """

    FULL = "full"
    LOW_MEMORY = "low_memory"
    UNIFIED_MEMORY = "unified_memory"
    STREAMING = "streaming"

    def __str__(self) -> str:
        return str(self.value)


# The constructor is written out, as many of its arguments are taken by position and some by two names.
@dataclass(frozen=True, kw_only=True, init=False)
class ModelLoadingConfig:
    """The settings of loading a model. Those up to `llama_pro_path` are taken by position too.

    model_name: a folder, URL or Hub name, for `ModelLoaderFactory`. backend: a `Backend`, or its value ("cuda").
    loading_strategy, or strategy: a `LoadingStrategy`, or its value ("streaming"); by default UNIFIED_MEMORY on MPS and
    MLX, and FULL elsewhere. quantization_config, or quantize: for weights that are not quantized yet, a
    `QuantizationConfig`, a scheme, or the name of one ("nf4"; "none" leaves weights as they are). dtype: of float
    weights; by default float16 on MPS and MLX, elsewhere the checkpoint's, as "auto" means everywhere. device: one of
    several ("cuda:1"). low_memory: LOW_MEMORY. offload_to_cpu: weights come to lie in the CPU's memory whatever the
    device, as FSDP's offload has them. max_memory: bytes by device ("cpu", "cuda:0"), as a number or "8GB".
    loading_workers, or workers: the number of threads that read and encode; -1, or None: as many as this process may
    use CPUs. use_safetensors: of a folder that has both, safetensors is read; False: .bin. use_cache: keep encoded
    weights on disk for the next load; STREAMING always does. attn_implementation, or attention: transformers'; by
    default the model's own choice, which is "sdpa" if it has that. rank, world_size: this process's number, of how
    many; by default those of torch.distributed's group, if there is one. verbose: log each step, on rank 0.
    llama_pro_path: a checkpoint that is a block expansion of the model, to load instead of it.

    decode: whether quantized weights are decoded to floats. memory_budget_mb: the limit of streamed weights held at
    once, in 1e6 bytes. llama_pro_blocks: the number of blocks to add by block expansion. ignore_unexpected: regular
    expressions for stored tensors that the model need not have.

    Raises:
        BadSpec: settings are unknown, wrong or contradict each other; all at once.
    """

    model_name: str | Path | None
    backend: Backend
    loading_strategy: LoadingStrategy
    quantization_config: Quantize | None
    dtype: str | None
    device: str | None
    low_memory: bool
    offload_to_cpu: bool
    max_memory: Mapping[str, int | str] | None
    loading_workers: int
    use_safetensors: bool
    use_cache: bool
    attn_implementation: str | None
    rank: int
    world_size: int
    verbose: bool
    llama_pro_path: str | Path | None
    decode: bool
    memory_budget_mb: float
    llama_pro_blocks: int
    ignore_unexpected: tuple[str, ...]

    def __new__(cls, *given: Any, **settings: Any) -> ModelLoadingConfig:
        """Refuse unknown settings in words; Python's own error would not say what was meant."""
        known = [*signature(cls.__init__).parameters][1:]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise BadSpec([f"{name}: {_no_setting(name, settings[name], known)}" for name in unknown])
        return object.__new__(cls)

    def __init__(
        self,
        model_name: str | Path | None = None,
        backend: Backend | str = Backend.AUTO,
        loading_strategy: LoadingStrategy | str | None = None,
        quantization_config: Quantize | None = None,
        dtype: Any = None,
        device: Any = None,
        low_memory: bool = False,
        offload_to_cpu: bool = False,
        max_memory: Mapping[str, int | str] | None = None,
        loading_workers: int | None = CHOSEN,
        use_safetensors: bool = True,
        use_cache: bool = False,
        attn_implementation: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        verbose: bool = False,
        llama_pro_path: str | Path | None = None,
        *,
        strategy: LoadingStrategy | str | None = None,
        quantize: Quantize | None = None,
        attention: str | None = None,
        workers: int | None = None,
        decode: bool = False,
        memory_budget_mb: float = 2000.0,
        llama_pro_blocks: int = 0,
        ignore_unexpected: Sequence[str] = (),
    ) -> None:
        given = dict(locals())
        del given["self"]
        _one_name_each(given)
        # As recommendations call it; it is the same as no name at all.
        given["quantization_config"] = None if given["quantization_config"] == PLAIN else given["quantization_config"]
        given["dtype"], given["device"] = name_of_dtype(dtype), name_of_dtype(device)
        given["ignore_unexpected"] = tuple(ignore_unexpected)
        problems = _wrong_types(given)
        if problems:
            raise BadSpec(problems)
        given["loading_workers"] = CHOSEN if given["loading_workers"] is None else given["loading_workers"]
        config = given["quantization_config"]
        if isinstance(config, QuantizationConfig) and config.method not in COMPUTES_ALONE:
            given["dtype"] = given["dtype"] or config.compute_dtype
        _name_backend(given, problems)
        _name_strategy(given, problems)
        for name, value in given.items():
            object.__setattr__(self, name, value)
        problems += self._contradictions()
        if problems:
            raise BadSpec(problems)

    def _contradictions(self) -> list[str]:
        problems, streams = [], self.loading_strategy is LoadingStrategy.STREAMING
        config = self.quantization_config
        if self.decode and config is not None:
            problems.append("decode: it belongs to quantized weights as floats, quantize to the other way: give one")
        if self.llama_pro_blocks and self.llama_pro_path is not None:
            problems.append("llama_pro_path: its blocks are there already; give it or llama_pro_blocks")
        if streams and self.offload_to_cpu:
            problems.append("offload_to_cpu: with strategy=streaming weights lie nowhere between forwards; give one")
        if streams and self.max_memory is not None:
            problems.append("max_memory: with strategy=streaming, memory_budget_mb limits the weights that are held")
        compute, computes_alone = self.compute_dtype, getattr(config, "method", None) in COMPUTES_ALONE
        if compute not in (None, self.dtype) and not computes_alone:
            problems.append(f"compute_dtype: the method computes in the model's dtype; give {compute} for both, or one")
        if not 0 <= self.rank < self.world_size:
            problems.append(
                f"rank: expected 0 to {self.world_size - 1} of world_size={self.world_size}, found {self.rank}"
            )
        return problems

    def with_settings(self, **settings: Any) -> ModelLoadingConfig:
        """Return the settings with some replaced, under either of their names.

        Raises:
            BadSpec: as a ModelLoadingConfig.
        """
        kept: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {NAMES.get(name, name) for name in settings}
        if own & {"backend", "device", "low_memory"} and self.loading_strategy is self._usual_strategy:
            del kept["loading_strategy"]  # another backend may have another one
        if "loading_strategy" in own and self.low_memory:
            del kept["low_memory"]
        if "backend" in own and self.device is not None and "device" not in own:
            del kept["device"]
        if "device" in own and "backend" not in own:
            del kept["backend"]
        return ModelLoadingConfig(**{name: value for name, value in kept.items() if name not in own}, **settings)

    @property
    def _usual_strategy(self) -> LoadingStrategy:
        return _usual(self.backend, self.low_memory)

    @property
    def strategy(self) -> LoadingStrategy:
        return self.loading_strategy

    @property
    def quantize(self) -> Quantize | None:
        return self.quantization_config

    @property
    def attention(self) -> str | None:
        return self.attn_implementation

    @property
    def workers(self) -> int | None:
        return None if self.loading_workers == CHOSEN else self.loading_workers

    @property
    def scheme(self) -> Scheme | None:
        """The scheme that plain weights are encoded by; None leaves them plain."""
        return scheme_of(self.quantization_config)

    @property
    def compute_dtype(self) -> str | None:
        """The dtype that quantized modules compute in; None: the model's."""
        config = self.quantization_config
        return config.compute_dtype if isinstance(config, QuantizationConfig) else None

    @property
    def limits(self) -> dict[str, int]:
        """`max_memory` in bytes, by device.

        Raises:
            BadSpec: a value is not a size.
        """
        return {device: _bytes(size, device) for device, size in (self.max_memory or {}).items()}


def _one_name_each(given: dict[str, Any]) -> None:
    """Put what is given under a short name under the long one.

    Raises:
        BadSpec: both are given, with different values.
    """
    usual, problems = {"loading_workers": CHOSEN}, []
    for short, long in NAMES.items():
        value = given.pop(short)
        if value is None:
            continue
        if given[long] not in (None, usual.get(long), value):
            problems.append(f"{short}: {value} was given, and as {long} {given[long]}; they are one setting: give one")
        given[long] = value
    if problems:
        raise BadSpec(problems)


def _wrong_types(given: Mapping[str, Any]) -> list[str]:
    problems = [not_positive("memory_budget_mb", given["memory_budget_mb"])]
    workers, quantize = given["loading_workers"], given["quantization_config"]
    if workers not in (None, CHOSEN):
        problems.append(not_positive("workers", workers, whole=True, least=1))
    if not isinstance(given["backend"], str):
        problems.append(f"backend: expected one of {', '.join(BACKENDS)}, found {given['backend']!r}")
    if quantize is not None and (wrong := wrong_quantization(quantize)) is not None:
        problems.append(f"quantize: {wrong}")
    if not (given["max_memory"] is None or isinstance(given["max_memory"], Mapping)):
        problems.append(f"max_memory: expected such as {{'cpu': '8GB'}}, found {given['max_memory']!r}")
    for name in ("llama_pro_blocks", "rank", "world_size"):
        if isinstance(given[name], bool) or not isinstance(given[name], int):
            problems.append(f"{name}: expected a whole number, found {given[name]!r}")
    for name in ("low_memory", "offload_to_cpu", "use_safetensors", "use_cache", "verbose", "decode"):
        if not isinstance(given[name], bool):
            problems.append(f"{name}: expected True or False, found {given[name]!r}")
    dtype, device = given["dtype"], given["device"]
    if dtype not in (None, "auto", *DTYPES):
        problems.append(f"dtype: unknown {dtype!r}{near(str(dtype), DTYPES)}; known: {', '.join(DTYPES)}, auto")
    kind, _, number = str(device).partition(":")
    if device is not None and (kind not in BACKENDS[1:] or (number and not (kind == "cuda" and number.isdecimal()))):
        hint = near(kind, BACKENDS[1:])
        problems.append(f"device: unknown {device!r}{hint}; known: {', '.join(BACKENDS[1:])}, cuda:N")
    return [problem for problem in problems if problem is not None]


def _name_backend(given: dict[str, Any], problems: list[str]) -> None:
    backend, device = given["backend"], given["device"]
    if backend not in BACKENDS:
        # A device's number is no part of a backend.
        hint = near(backend.partition(":")[0], BACKENDS) or near(backend, BACKENDS)
        problems.append(f"backend: unknown {backend!r}{hint}; known: {', '.join(BACKENDS)}")
        return
    given["backend"] = Backend(backend)
    if device is not None:
        kind = Backend(device.partition(":")[0])
        if given["backend"] not in (Backend.AUTO, kind):
            problems.append(f"device: {device} is none of backend={backend}; give backend={str(kind)!r}, or no device")
        given["backend"] = kind


def _name_strategy(given: dict[str, Any], problems: list[str]) -> None:
    asked, low = given["loading_strategy"], given["low_memory"]
    known = {each.value: each for each in LoadingStrategy}
    if asked is not None and not isinstance(asked, LoadingStrategy):
        if str(asked).lower() not in known:
            hint = near(str(asked), known)
            problems.append(f"strategy: unknown {asked!r}{hint}; known: {', '.join(known)}")
        asked = known.get(str(asked).lower())
    # FULL beside low_memory is what trainers have as their default, and so no contradiction.
    if low and asked not in (None, LoadingStrategy.FULL, LoadingStrategy.LOW_MEMORY):
        problems.append(f"low_memory: it is strategy=low_memory, and strategy={asked} is given; give one")
    usual = _usual(given["backend"], low)
    given["loading_strategy"] = usual if low or asked is None else asked


def _usual(backend: str, low_memory: bool) -> LoadingStrategy:
    if low_memory:
        return LoadingStrategy.LOW_MEMORY
    return LoadingStrategy.UNIFIED_MEMORY if backend in APPLES else LoadingStrategy.FULL


def _no_setting(name: str, value: object, known: Sequence[str]) -> str:
    """Say what to give instead of a setting that there is not."""
    if name in ("load_in_4bit", "load_in_8bit"):
        return f"no such setting; give quantize={'nf4' if name == 'load_in_4bit' else 'int8'!r}"
    if name in ("device_map", "map_location"):
        where = str(value).partition(":")[0]
        where = where if where in BACKENDS else meant(where, BACKENDS) or "auto"
        known = ", ".join(BACKENDS)
        return f"no such setting; give backend={where!r} (known: {known}), or max_memory to share a model out"
    return unknown_setting(name, known)


def _bytes(size: int | str, device: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", str(size), re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    if match is None or unit not in UNITS:
        raise BadSpec(f"max_memory: {size!r} for {device} is no size; expected bytes, or such as '8GB' or '512MiB'")
    return int(float(match[1]) * UNITS[unit])
