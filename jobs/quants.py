"""What can be asked of a quantization: one model for each `kind` in conf/quant, and the scheme it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from jobs.strict import FloatName, Spec
from loaders.mixes import MIXES, GgmlMix
from loaders.quantization.bnb4 import GROUP_SIZES, STORAGE_DTYPES, Bnb4
from loaders.quantization.ggml import TYPES, Ggml
from loaders.quantization.plain import Plain
from loaders.quantization.scheme import Scheme
from loaders.quantization.ternary import Ternary
from loaders.rules import Mix
from loaders.specs import DTYPES


class Quant(Spec):
    """What all of conf/quant have in common."""

    name: str

    @property
    def scheme(self) -> Scheme:
        raise NotImplementedError

    @property
    def mix(self) -> Mix | None:
        """What gives tensors different schemes, if something does."""
        return None

    @property
    def label(self) -> str | None:
        """What files are called after it, where they are called after their quantization."""
        return None

    def varied(self, settings: dict[str, Any]) -> Scheme:
        """The scheme with some settings changed.

        Raises:
            ValidationError: an unknown setting, or a wrong value.
        """
        return type(self).model_validate({**self.model_dump(), **settings}).scheme


class NoneQuant(Quant):
    """quant=none."""

    kind: Literal["none"]
    dtype: FloatName | None = Field(description="cast float weights to this dtype; null copies them")

    @property
    def scheme(self) -> Scheme:
        return Plain(next((d.name for d in DTYPES.values() if d.torch == self.dtype), None))


class Bnb4Quant(Quant):
    """quant=nf4, quant=fp4."""

    kind: Literal["bnb4"]
    table: Literal["nf4", "fp4"] = Field(description="the sixteen values of a code")
    group_size: int = Field(description=f"weights sharing one scale: {', '.join(map(str, GROUP_SIZES))}")
    double_quant: bool = Field(description="quantize the scales too (about 0.4 bits a weight less)")
    storage_dtype: str = Field(description=f"the dtype the packed codes are stored as: {', '.join(STORAGE_DTYPES)}")
    compute_dtype: FloatName | None = Field(description="what the engine computes in; the model's dtype by default")

    @property
    def scheme(self) -> Scheme:
        return Bnb4(self.table, self.group_size, self.double_quant, self.storage_dtype)

    @field_validator("group_size")
    @classmethod
    def _group_size_is_known(cls, size: int) -> int:
        if size not in GROUP_SIZES:
            raise ValueError(f"expected one of {', '.join(map(str, GROUP_SIZES))}")
        return size

    @field_validator("storage_dtype")
    @classmethod
    def _storage_is_known(cls, name: str) -> str:
        if name not in STORAGE_DTYPES:
            raise ValueError(f"expected one of {', '.join(STORAGE_DTYPES)}")
        return name


class TernaryQuant(Quant):
    """quant=ternary."""

    kind: Literal["ternary"]
    linear_class: Literal["bitlinear", "autobitlinear"] = Field(
        description="transformers' module; it decides the meaning of weight_scale"
    )

    @property
    def scheme(self) -> Scheme:
        return Ternary(self.linear_class)


class GgmlQuant(Quant):
    """quant=gguf_*."""

    kind: Literal["ggml"]
    file_type: str = Field(description=f"llama.cpp's mix of types: {', '.join(MIXES)}")
    type: str | None = Field(description=f"with rules: another type for some tensors: {', '.join(TYPES)}")
    pure: bool = Field(description="every matrix gets the mix's first type; false: as llama-quantize chooses")

    @property
    def scheme(self) -> Scheme:
        return Ggml(self.type or MIXES[self.file_type])

    @property
    def mix(self) -> Mix | None:
        return GgmlMix(self.file_type, self.pure)

    @property
    def label(self) -> str | None:
        return self.file_type

    @field_validator("file_type")
    @classmethod
    def _file_type_is_known(cls, name: str) -> str:
        if name not in MIXES:
            raise ValueError(f"expected one of {', '.join(MIXES)}")
        return name

    @field_validator("type")
    @classmethod
    def _type_is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in TYPES:
            raise ValueError(f"expected one of {', '.join(TYPES)}")
        return name


QuantSpec = Annotated[NoneQuant | Bnb4Quant | TernaryQuant | GgmlQuant, Field(discriminator="kind")]
