"""The settings of quantizations: one model for each `kind` in conf/quant, and the scheme that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from loaders.dtypes import DTYPES
from loaders.errors import BadSpec, setting
from loaders.presets.base import FloatName, Location, Spec
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitnet import Ternary
from loaders.quantization.schemes.bitsandbytes_4bit import GROUP_SIZES, STORAGE_DTYPES, Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedMxfp4, CompressedNvfp4
from loaders.quantization.schemes.compressed_tensors_fp8_block import Fp8Block
from loaders.quantization.schemes.compressed_tensors_int import GROUP_SIZES as INT_GROUP_SIZES
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.quantization.schemes.compressed_tensors_rowwise import RowScaled
from loaders.quantization.schemes.ggml import TYPES, Ggml
from loaders.quantization.schemes.hqq import BITS, Hqq
from loaders.quantization.schemes.mlx_affine import BITS as MLX_BITS
from loaders.quantization.schemes.mlx_affine import GROUP_SIZES as MLX_GROUP_SIZES
from loaders.quantization.schemes.mlx_affine import MlxAffine
from loaders.quantization.schemes.mlx_float import SETTINGS as MLX_FLOATS
from loaders.quantization.schemes.mlx_float import MlxFloat
from loaders.quantization.schemes.plain import Plain
from loaders.rules.llama_cpp import MIXES, TERNARY, GgmlMix
from loaders.rules.mlx import MixedRecipe, MlxRules, bits_of
from loaders.rules.rule import Mix


class Quant(Spec):
    """The base of all quantizations in conf/quant; each subclass is one `kind`."""

    name: str = Field(pattern=r"^[\w.\-]+$", description="names the output")

    @property
    def scheme(self) -> Scheme:
        raise NotImplementedError

    @property
    def mix(self) -> Mix | None:
        """The mix, if the quantization gives tensors different schemes; else None."""
        return None

    @property
    def label(self) -> str | None:
        """The quantization's part of the file name, for engines that name files after it; else None."""
        return None

    def varied(self, settings: dict[str, Any]) -> Scheme:
        """Return the scheme with some settings changed, as a rule's own `quant` asks for.

        Raises:
            ValidationError: an unknown setting, or a wrong value.
        """
        return type(self).model_validate({**self.model_dump(), **settings}).scheme


class NoneQuant(Quant):
    """The settings of quant=none."""

    kind: Literal["none"]
    dtype: FloatName | None = Field(description="cast float weights to this dtype; null copies them")

    @property
    def scheme(self) -> Scheme:
        return Plain(next((d.name for d in DTYPES.values() if d.torch == self.dtype), None))


class Bnb4Quant(Quant):
    """The settings of quant=nf4 and quant=fp4."""

    kind: Literal["bnb4"]
    table: Literal["nf4", "fp4"] = Field(description="the sixteen values of a code")
    group_size: int = Field(description=f"weights sharing one scale: {', '.join(map(str, GROUP_SIZES))}")
    double_quant: bool = Field(description="quantize the scales too (about 0.4 bits per weight less)")
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

    @model_validator(mode="after")
    def _name_says_the_table(self) -> Bnb4Quant:
        if self.name in ("nf4", "fp4") and self.name != self.table:
            raise ValueError(
                f"{setting('quantize')}={self.name} stores {self.name}; give {setting('quantize')}={self.table}"
            )
        return self

    @field_validator("storage_dtype")
    @classmethod
    def _storage_is_known(cls, name: str) -> str:
        if name not in STORAGE_DTYPES:
            raise ValueError(f"expected one of {', '.join(STORAGE_DTYPES)}")
        return name


class Int8Quant(Quant):
    """The settings of quant=int8."""

    kind: Literal["int8"]

    @property
    def scheme(self) -> Scheme:
        return LlmInt8()


class TernaryQuant(Quant):
    """The settings of quant=ternary."""

    kind: Literal["ternary"]
    linear_class: Literal["bitlinear", "autobitlinear"] = Field(
        description="transformers' module; it decides the meaning of weight_scale"
    )

    @property
    def scheme(self) -> Scheme:
        return Ternary(self.linear_class)


class HqqQuant(Quant):
    """The settings of quant=hqq8, hqq4, hqq3 and hqq2."""

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


# compressed-tensors' preset schemes by name, with the group sizes of quantization/quant_scheme.py there
COMPRESSED_TENSORS: dict[str, Scheme] = {
    "fp8_dynamic": RowScaled("float"),
    "fp8_block": Fp8Block(),
    "w8a8": RowScaled("int"),
    "w8a16": PackedInt(8),
    "w4a16": PackedInt(4),
    "w4a16_asym": PackedInt(4, symmetric=False),
    "nvfp4a16": CompressedNvfp4(),
    "mxfp4a16": CompressedMxfp4(),
    "mxfp4": CompressedMxfp4(activations=True),
}


class CompressedTensorsQuant(Quant):
    """The settings of quant=w4a16 and the other preset schemes of compressed-tensors."""

    kind: Literal["compressed_tensors"]
    preset: Literal[
        "fp8_dynamic", "fp8_block", "w8a8", "w8a16", "w4a16", "w4a16_asym", "nvfp4a16", "mxfp4a16", "mxfp4"
    ] = Field(description="compressed-tensors' name of the scheme; a rule may give tensors another one")
    group_size: int | None = Field(
        description=f"weights sharing one scale, in w4a16, w4a16_asym, w8a16: {', '.join(map(str, INT_GROUP_SIZES))};"
        " null is the scheme's own"
    )

    @property
    def scheme(self) -> Scheme:
        scheme = COMPRESSED_TENSORS[self.preset]
        if self.group_size is None:
            return scheme
        assert isinstance(scheme, PackedInt), scheme
        return replace(scheme, group_size=self.group_size)

    @field_validator("group_size")
    @classmethod
    def _group_size_fits(cls, size: int | None, info: ValidationInfo) -> int | None:
        preset = info.data.get("preset")
        if size is None or preset is None:
            return size
        if not isinstance(COMPRESSED_TENSORS[preset], PackedInt):
            raise ValueError(f"{preset} has groups of its own: expected null")
        if size not in INT_GROUP_SIZES:
            raise ValueError(f"expected one of {', '.join(map(str, INT_GROUP_SIZES))}, or null")
        return size


class MlxQuant(Quant):
    """The settings of quant=mlx_int4, quant=mlx_int8, quant=mlx_mxfp4 and the like."""

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
    """The settings of quant=mlx_mixed_4_6."""

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


class GgmlQuant(Quant):
    """The settings of quant=gguf_*."""

    kind: Literal["ggml"]
    file_type: str = Field(description=f"llama.cpp's mix of types: {', '.join(MIXES)}")
    type: str | None = Field(description=f"with rules: another type for some tensors: {', '.join(TYPES)}")
    pure: bool = Field(description="every matrix gets the mix's first type; false: as llama-quantize chooses")
    embedding_type: str | None = Field(description="the embedding's type; null: as llama-quantize chooses")
    output_type: str | None = Field(description="the output projection's type, or a tied embedding's; null: likewise")
    absmean: bool = Field(description="round to -1, 0, 1 times the mean magnitude first, as BitNet; for TQ1_0, TQ2_0")
    imatrix: Location | None = Field(
        default=None,
        description="the file of an importance matrix, as llama-imatrix writes it: a path, or a URL; null: without",
    )

    @property
    def scheme(self) -> Scheme:
        chosen = self.type or MIXES[self.file_type]
        return Ggml(chosen, self.absmean and chosen in TERNARY)

    @property
    def mix(self) -> Mix | None:
        return GgmlMix(
            name=self.file_type,
            pure=self.pure,
            embedding=self.embedding_type,
            output=self.output_type,
            absmean=self.absmean,
            has_imatrix=self.imatrix is not None,
        )

    @property
    def label(self) -> str | None:
        return self.file_type

    def varied(self, settings: dict[str, Any]) -> Scheme:
        if "imatrix" in settings:
            raise BadSpec(f"imatrix: one importance matrix is for all tensors; give it as {setting('imatrix')}")
        return super().varied(settings)

    @field_validator("file_type")
    @classmethod
    def _file_type_is_known(cls, name: str) -> str:
        if name not in MIXES:
            raise ValueError(f"expected one of {', '.join(MIXES)}")
        return name

    @model_validator(mode="after")
    def _absmean_is_for_ternary_types(self) -> GgmlQuant:
        if self.absmean and self.file_type not in TERNARY:
            raise ValueError(f"absmean: only for file_type {', '.join(TERNARY)}, found {self.file_type}")
        return self

    @field_validator("type", "embedding_type", "output_type")
    @classmethod
    def _type_is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in TYPES:
            raise ValueError(f"expected one of {', '.join(TYPES)}")
        return name


OneQuant = (
    NoneQuant
    | Bnb4Quant
    | Int8Quant
    | TernaryQuant
    | HqqQuant
    | CompressedTensorsQuant
    | MlxQuant
    | MlxMixedQuant
    | GgmlQuant
)
