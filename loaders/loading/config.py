"""The settings of `load_weights`, validated."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from loaders.backends import DEVICES
from loaders.errors import BadSpec
from loaders.faults import named, place_of, sentences
from loaders.near_misses import meant, near, unknown_setting
from loaders.presets.base import FloatName, Spec
from loaders.presets.catalog import DEFAULT, preset
from loaders.presets.settings import Quant
from loaders.strategies import loader


class LoadConfig(Spec):
    """The settings of a load: immutable, and validated when created."""

    quantize: str | bool | None = Field(default=None, description="a preset of conf/quant; true: nf4")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the preset: group_size, ...")
    layer_filter: str | tuple[str, ...] | None = Field(
        default=None, description="parts of names, or patterns with * and ?: what is loaded"
    )
    device: str = Field(default="cpu", description="where weights come to lie: cpu, cuda, cuda:1, mps")
    dtype: FloatName | None = Field(default=None, description="of float weights; null: as they are stored")
    strategy: str = Field(default="auto", description="how files are read")
    backend: Literal["cpu", "cuda", "mps", "mlx"] = Field(default="cpu", description="where encoders run")
    use_cache: bool = Field(default=False, description="keep on disk what was made of weights, and take it from there")
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
        # torch's own object for a device stands for its name.
        return str(device) if type(device).__module__ == "torch" else device

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
        return preset(DEFAULT if self.quantize is True else self.quantize, **self.settings)


def load_config(config: Mapping[str, Any]) -> LoadConfig:
    """Make a config from a mapping of its fields.

    Raises:
        BadSpec: a field is unknown or wrong; all such faults at once.
    """
    if not isinstance(config, Mapping):
        raise BadSpec(
            f"config: expected a LoadConfig or a mapping of its fields, such as {{'quantize': 'nf4'}}, found {config!r}"
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
