"""What can be asked of a quantization: one model for each `kind` in conf/quant, and the scheme it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from jobs.strict import FloatName, Spec
from loaders.quantization.bnb4 import GROUP_SIZES, STORAGE_DTYPES, Bnb4
from loaders.quantization.hqq import BITS, Hqq
from loaders.quantization.int8 import LlmInt8
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


class Int8Quant(Quant):
    """quant=int8."""

    kind: Literal["int8"]

    @property
    def scheme(self) -> Scheme:
        return LlmInt8()


class TernaryQuant(Quant):
    """quant=ternary."""

    kind: Literal["ternary"]
    linear_class: Literal["bitlinear", "autobitlinear"] = Field(
        description="transformers' module; it decides the meaning of weight_scale"
    )

    @property
    def scheme(self) -> Scheme:
        return Ternary(self.linear_class)


class HqqQuant(Quant):
    """quant=hqq8, hqq4, hqq3, hqq2."""

    kind: Literal["hqq"]
    bits: Literal[8, 4, 3, 2, 1] = Field(description=f"bits of a code: {', '.join(map(str, BITS))}")
    group_size: int = Field(gt=0, multiple_of=8, description="weights sharing a scale and a zero: a multiple of 8")
    axis: Literal[0, 1] = Field(description="1: groups are runs of weights; 0: a group's weights lie far apart")
    compute_dtype: FloatName | None = Field(
        description="the dtype of scales and zeros, and of the engine's arithmetic; the model's by default"
    )

    @property
    def scheme(self) -> Scheme:
        dtype = next((d.name for d in DTYPES.values() if d.torch == self.compute_dtype), None)
        return Hqq(self.bits, self.group_size, self.axis, dtype)


QuantSpec = Annotated[
    NoneQuant | Bnb4Quant | Int8Quant | TernaryQuant | HqqQuant,
    Field(discriminator="kind"),
]
