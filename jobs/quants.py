"""What can be asked of a quantization: one model for each `kind` in conf/quant, and the scheme it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jobs.strict import FloatName, Spec
from loaders.mixes.mlx import MixedRecipe, MlxRules, bits_of
from loaders.quantization.bnb4 import GROUP_SIZES, STORAGE_DTYPES, Bnb4
from loaders.quantization.mlx import BITS as MLX_BITS
from loaders.quantization.mlx import GROUP_SIZES as MLX_GROUP_SIZES
from loaders.quantization.mlx import MlxAffine
from loaders.quantization.mlx_float import SETTINGS as MLX_FLOATS
from loaders.quantization.mlx_float import MlxFloat
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


class TernaryQuant(Quant):
    """quant=ternary."""

    kind: Literal["ternary"]
    linear_class: Literal["bitlinear", "autobitlinear"] = Field(
        description="transformers' module; it decides the meaning of weight_scale"
    )

    @property
    def scheme(self) -> Scheme:
        return Ternary(self.linear_class)


class MlxQuant(Quant):
    """quant=mlx_int4, quant=mlx_int8, quant=mlx_mxfp4, ..."""

    kind: Literal["mlx"]
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = Field(description="whole numbers, or small floats")
    bits: int = Field(description=f"of a code; affine has {', '.join(map(str, MLX_BITS))}")
    group_size: int = Field(description=f"weights sharing a scale; affine has {', '.join(map(str, MLX_GROUP_SIZES))}")

    @property
    def scheme(self) -> Scheme:
        return MlxAffine(self.bits, self.group_size) if self.mode == "affine" else MlxFloat(self.mode)

    @property
    def mix(self) -> Mix | None:
        return MlxRules(self.group_size)

    @model_validator(mode="after")
    def _mode_has_them(self) -> MlxQuant:
        known: tuple[tuple[int, ...], tuple[int, ...]] = (MLX_BITS, MLX_GROUP_SIZES)
        if self.mode != "affine":
            bits, group = MLX_FLOATS[self.mode]
            known = ((bits,), (group,))
        for name, value, values in zip(("bits", "group_size"), (self.bits, self.group_size), known, strict=True):
            if value not in values:
                raise ValueError(f"{name} is {value}; {self.mode} has {', '.join(map(str, values))}")
        return self


class MlxMixedQuant(Quant):
    """quant=mlx_mixed_4_6."""

    kind: Literal["mlx_mixed"]
    recipe: MixedRecipe = Field(description="mlx-lm's, by its low and its high bits")
    group_size: int = Field(description=f"weights sharing a scale: {', '.join(map(str, MLX_GROUP_SIZES))}")

    @property
    def scheme(self) -> Scheme:
        return MlxAffine(bits_of(self.recipe)[0], self.group_size)

    @property
    def mix(self) -> Mix | None:
        return MlxRules(self.group_size, MlxAffine(bits_of(self.recipe)[1], self.group_size))

    def varied(self, settings: dict[str, Any]) -> Scheme:
        low = {
            "kind": "mlx",
            "name": self.name,
            "mode": "affine",
            "bits": bits_of(self.recipe)[0],
            "group_size": self.group_size,
        }
        return MlxQuant.model_validate({**low, **settings}).scheme

    @field_validator("group_size")
    @classmethod
    def _group_size_is_known(cls, size: int) -> int:
        if size not in MLX_GROUP_SIZES:
            raise ValueError(f"expected one of {', '.join(map(str, MLX_GROUP_SIZES))}")
        return size


QuantSpec = Annotated[NoneQuant | Bnb4Quant | TernaryQuant | MlxQuant | MlxMixedQuant, Field(discriminator="kind")]
