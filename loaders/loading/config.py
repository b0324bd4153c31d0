"""The settings of `load_weights`, validated."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field, SkipValidation, ValidationError, field_validator

from loaders.backends import DEVICES
from loaders.backends.devices import device_name
from loaders.errors import BadSpec
from loaders.faults import named, place_of, sentences
from loaders.near_misses import meant, near, unknown_setting
from loaders.presets.base import FloatName, Spec
from loaders.presets.catalog import DEFAULT, preset
from loaders.presets.settings import Quant
from loaders.strategies import loader


class LoadConfig(Spec):
    """The settings of a load: immutable, and validated when created."""

    # Checked below: a choice between texts and models would be told as three faults.
    quantize: SkipValidation[str | bool | Quant | None] = Field(
        default=None, description="a preset of conf/quant, or what preset() made; true: nf4"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the preset: group_size, ...")
    layer_filter: str | tuple[str, ...] | None = Field(
        default=None, description="parts of names, or patterns with * and ?: what is loaded"
    )
    device: str = Field(default="cpu", description="where weights come to lie: cpu, cuda, cuda:1, mps")
    dtype: FloatName | None = Field(default=None, description="of float weights; null: as they are stored")
    strategy: str = Field(default="auto", description="how files are read")
    backend: Literal["cpu", "cuda", "mps", "mlx"] = Field(default="cpu", description="where encoders run")
    use_cache: bool = Field(default=False, description="keep on disk what was made of weights, and take it from there")
    cache_dir: str | None = Field(default=None, description="the cache's folder; null: the process's, see `configure`")
    measure: bool = Field(default=True, description="decode what was quantized, compare it with its source")
    allow_nonfinite: bool = Field(default=False, description="quantize tensors with NaN or infinities, too")
    check_finite: bool = Field(default=False, description="look for NaN and infinities in plain weights, too")
    max_relative_error: float | None = Field(default=None, gt=0, description="of each tensor; null: its scheme's own")
    expected_shapes: dict[str, tuple[int, ...]] | None = Field(
        default=None, description="by name, what must be there, and nothing else (of what the filter takes)"
    )

    def __init__(self, **values: Any) -> None:
        """Create the settings.

        Raises:
            BadSpec: a field is unknown or wrong; all such faults at once.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise BadSpec(_said(error.errors())) from None
        # Both raise BadSpec for names that do not exist, so that bad settings fail before a load begins.
        loader(self.strategy)
        self.quant  # noqa: B018

    @field_validator("quantize")
    @classmethod
    def _quantize_is_a_preset(cls, quantize: Any) -> Any:
        if not isinstance(quantize, str | bool | Quant | None):
            raise ValueError("expected a text, or true or false")
        return quantize

    # Strict models take a tuple for a tuple alone; a list, or a torch.Size, is as good.
    @field_validator("layer_filter", mode="before")
    @classmethod
    def _filters_are_a_tuple(cls, filters: Any) -> Any:
        return tuple(filters) if isinstance(filters, list | set | frozenset) else filters

    @field_validator("expected_shapes", mode="before")
    @classmethod
    def _shapes_are_tuples(cls, shapes: Any) -> Any:
        if not isinstance(shapes, Mapping):
            return shapes
        return {name: tuple(shape) if isinstance(shape, list | tuple) else shape for name, shape in shapes.items()}

    @field_validator("device", mode="before")
    @classmethod
    def _device_is_a_name(cls, device: Any) -> Any:
        # What is no name and no device of torch's is refused with all other faults.
        return device_name(device) if isinstance(device, str) or type(device).__module__ == "torch" else device

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _folder_is_a_text(cls, folder: Any) -> Any:
        return os.fspath(folder) if isinstance(folder, os.PathLike) else folder

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str) -> str:
        kind, _, index = device.partition(":")
        if kind not in DEVICES or (index and not index.isdecimal()):
            raise ValueError(f"expected one of {', '.join(DEVICES)}, cuda:N{near(device, DEVICES)}")
        return device

    @property
    def quant(self) -> Quant | None:
        """The quantization that `quantize` and `settings` name; None if weights are not quantized.

        Raises:
            BadSpec: no such preset or setting.
        """
        if self.quantize is None or self.quantize is False:
            if self.settings:
                raise BadSpec("settings: they are of a preset; give quantize")
            return None
        if isinstance(self.quantize, Quant):
            if self.settings:
                raise BadSpec(f"settings: they are of a preset by its name; give preset({self.quantize.name!r}, ...)")
            return self.quantize
        return preset(DEFAULT if self.quantize is True else self.quantize, **self.settings)


@dataclass
class WeightLoaderConfig:
    """The settings of a `CheckpointLoader`, checked when they are made.

    quantize: True quantizes to `quantization_config`, False loads weights as they are; a preset's name is that preset.
    quantization_config: a preset's name, or what `preset` or `create_aggressive_config` made; None is ternary, BitNet's
    -1, 0, 1 (in `load_weights`, quantize=True is nf4).
    auto_aggressive: take `create_aggressive_config()` for it, the smallest there is.
    device: where weights come to lie: "cpu", "cuda", "cuda:1", "mps", or a torch.device.
    dtype: of the weights that are not quantized: float32, float16 or bfloat16 of numpy or torch, or by name; None
    leaves them as they are stored.
    validate_shapes: check what comes back against the headers: shapes of plain weights, sizes of a quantized weight's
    parts. Shapes by name are what the file must hold, and nothing else.
    compute_error: decode what was quantized and measure its error; without, the errors in the statistics are 0.
    use_cache, cache_dir: keep what was quantized on disk, by content and settings, and take it from there; None is the
    folder of `configure`.

    Raises:
        BadSpec: a value is wrong, or `auto_aggressive` meets a `quantization_config`.
    """

    quantize: bool | str = True
    quantization_config: str | Quant | None = None
    auto_aggressive: bool = False
    device: Any = "cpu"
    dtype: Any = "float32"
    validate_shapes: bool | Mapping[str, Any] = True
    compute_error: bool = True
    use_cache: bool = True
    cache_dir: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        self.request()

    def request(self, quantize: bool | str | None = None, layer_filter: Any = None, device: Any = None) -> LoadConfig:
        """Return these settings, some of them changed for one load, as those of `load_and_quantize`.

        Raises:
            BadSpec: a value is wrong.
        """
        if self.auto_aggressive and self.quantization_config is not None:
            raise BadSpec(
                "auto_aggressive: it is a quantization of its own, found a quantization_config beside it"
                f" ({str(self.quantization_config)[:50]}); give one of them"
            )
        named = self.quantize if isinstance(self.quantize, str) else "ternary"
        default = self.quantization_config or ("ternary_aggressive" if self.auto_aggressive else named)
        chosen = self.quantize if quantize is None else quantize
        is_numpy = isinstance(self.dtype, type | np.dtype)
        dtype = np.dtype(self.dtype).name if is_numpy else str(self.dtype).removeprefix("torch.")
        return LoadConfig(
            quantize=default if chosen is True else chosen,
            layer_filter=layer_filter,
            device=self.device if device is None else device,
            dtype=None if self.dtype is None else dtype,
            measure=self.compute_error,
            use_cache=self.use_cache,
            cache_dir=self.cache_dir,
            expected_shapes=None if isinstance(self.validate_shapes, bool) else self.validate_shapes,
        )


def create_aggressive_config() -> Quant:
    """Return the quantization that makes weights smallest: BitNet's -1, 0, 1 in ggml's TQ2_0, embedding and output
    projection in 4 bits. Tensors whose rows its blocks of 256 do not divide take another type, as the notes of a load
    say: of a model that llama.cpp knows what it takes instead (Q4_0), of others BitNet's own packing.
    """
    return preset("ternary_aggressive")


def aggressively(quantize: Any) -> Any:
    """Return what `quantize` becomes where the smallest is wanted.

    Raises:
        BadSpec: another quantization was asked for as well, or none.
    """
    if quantize not in (None, True, "ternary", "ternary_aggressive"):
        raise BadSpec(
            f"aggressive: it is quantize='ternary_aggressive', found quantize={quantize!r} beside it; give one of them"
        )
    return "ternary_aggressive"


@runtime_checkable
class Advises(Protocol):
    """What a recommendation has: it says by which settings a model is loaded."""

    def load_config(self) -> LoadConfig:
        """Return the settings.

        Raises:
            BadSpec: there are none.
        """
        ...


def load_config(config: LoadConfig | Mapping[str, Any] | WeightLoaderConfig | Quant | Advises | None) -> LoadConfig:
    """Make a config from a mapping of its fields, a loader's config, a quantization or a recommendation; None is nf4.

    Raises:
        BadSpec: a field is unknown or wrong, all such faults at once; or a recommendation found that nothing fits.
    """
    if isinstance(config, LoadConfig):
        return config
    if isinstance(config, WeightLoaderConfig):
        return config.request()
    if config is None or isinstance(config, Quant):
        return LoadConfig(quantize=config or True)
    if isinstance(config, Advises):
        return config.load_config()
    if not isinstance(config, Mapping):
        raise BadSpec(
            "config: expected a LoadConfig or a mapping of its fields, such as {'quantize': 'nf4'}, found"
            f" {config!r:.80}"
        )
    return LoadConfig(**config)


def _said(faults: Sequence[Any]) -> list[str]:
    """Say pydantic's faults in terms of the config's fields."""
    unknown = [named(place_of(LoadConfig, fault["loc"])) for fault in faults if fault["type"] == "extra_forbidden"]
    others = [fault for fault in faults if fault["type"] != "extra_forbidden"]
    return [*(f"{name}: {_no_field(name)}" for name in unknown), *sentences(LoadConfig, others)]


# Settings of presets, for a message that says where they go.
SETTINGS = ("group_size", "bits", "axis", "double_quant", "storage_dtype", "compute_dtype", "mode", "file_type", "pure")


def _no_field(name: str) -> str:
    fields = tuple(LoadConfig.model_fields)
    own = meant(name, SETTINGS)
    if own is None or meant(name, fields) is not None:
        return unknown_setting(name, fields)
    return f"no such setting; a preset's own go into settings={{{own!r}: ...}}"


def matches(name: str, filters: str | Sequence[str] | None) -> bool:
    """Whether a layer filter (None takes all) selects a tensor's name."""
    if filters is None:
        return True
    each = (filters,) if isinstance(filters, str) else filters
    return any(fnmatch.fnmatchcase(name, one) if set("*?[") & set(one) else one in name for one in each)
