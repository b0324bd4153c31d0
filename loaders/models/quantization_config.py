"""What the weights of a model are quantized to as it is loaded, by our names and by those of trainers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from loaders.errors import BadSpec
from loaders.near_misses import near, unknown_quant
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitsandbytes_4bit import GROUP_SIZES, Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.quantization.schemes.hqq import BITS, Hqq
from loaders.quantization.schemes.mlx_affine import GROUP_SIZES as MLX_GROUP_SIZES
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
DTYPES = ("float32", "float16", "bfloat16")


class QuantizationMethod(StrEnum):
    """Methods to which a model is quantized as it is loaded."""

    BNB_NF4 = "bnb_nf4"
    BNB_FP4 = "bnb_fp4"
    BNB_INT8 = "bnb_int8"
    HQQ = "hqq"
    MLX_INT4 = "mlx_int4"
    MLX_INT8 = "mlx_int8"

    @classmethod
    def _missing_(cls, value: object) -> QuantizationMethod | None:
        """Take presets' names of bitsandbytes' methods, too: "nf4" is BNB_NF4."""
        return next((each for each in cls if each.value == f"bnb_{value}"), None)


# By method: the bits that it may have, its own first, and the group sizes, its own first; none where rows are groups.
SIZES: dict[QuantizationMethod, tuple[tuple[int, ...], tuple[int, ...]]] = {
    QuantizationMethod.BNB_NF4: ((4,), (64, *GROUP_SIZES)),
    QuantizationMethod.BNB_FP4: ((4,), (64, *GROUP_SIZES)),
    QuantizationMethod.BNB_INT8: ((8,), ()),
    QuantizationMethod.HQQ: ((4, *BITS), (64, 8, 16, 32, 128, 256)),
    QuantizationMethod.MLX_INT4: ((4,), (64, *MLX_GROUP_SIZES)),
    QuantizationMethod.MLX_INT8: ((8,), (64, *MLX_GROUP_SIZES)),
}
HQQ_PRESET = re.compile(r"hqq([2348])")
PLAIN = "none"  # the name of the preset that leaves weights as they are
COMPUTES_ALONE = (QuantizationMethod.BNB_NF4, QuantizationMethod.BNB_FP4)


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """A method of quantization and its sizes.

    method: a `QuantizationMethod`, its value ("bnb_nf4"), or the name of a preset ("nf4", "hqq4"). bits: of a weight's
    code; the method's own by default, 4 with HQQ, which alone has a choice. group_size: weights that share a scale; 64
    by default, and none with BNB_INT8, where each row has one. compute_dtype: of the products ("bfloat16"); by default
    the model's dtype. Modules of other methods than bitsandbytes' of 4 bits compute in the model's dtype alone, which
    this then is. double_quant: whether scales are quantized, too, of which bitsandbytes' methods of 4 bits have a
    choice.

    Raises:
        BadSpec: the method has no such bits, groups or dtype; all such faults at once.
    """

    method: QuantizationMethod | str = QuantizationMethod.BNB_NF4
    bits: int | None = None
    group_size: int | None = None
    compute_dtype: str | None = None
    double_quant: bool = False

    def __post_init__(self) -> None:
        name = str(self.method).lower()
        if (preset := HQQ_PRESET.fullmatch(name)) is not None:
            if self.bits not in (None, int(preset[1])):
                raise BadSpec(f"bits: {self.method} has {preset[1]}, found {self.bits!r}; give method='hqq' for others")
            name = QuantizationMethod.HQQ
            object.__setattr__(self, "bits", int(preset[1]))
        try:
            method = QuantizationMethod(name)
        except ValueError:
            known = [each.value for each in QuantizationMethod]
            raise BadSpec(f"method: {unknown_quant(self.method, known)}") from None
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "compute_dtype", name_of_dtype(self.compute_dtype))
        bits, groups = SIZES[method]
        problems = []
        if self.bits is not None and self.bits not in bits:
            problems.append(f"bits: {method} has {_or(bits)}, found {self.bits!r}")
        if self.group_size is not None and not groups:
            problems.append(f"group_size: {method} has a scale for each row and no groups; leave it out")
        elif self.group_size is not None and self.group_size not in groups:
            problems.append(f"group_size: {method} takes {_or(groups)}, found {self.group_size!r}")
        if self.compute_dtype is not None and self.compute_dtype not in DTYPES:
            hint = near(str(self.compute_dtype), DTYPES)
            problems.append(f"compute_dtype: unknown {self.compute_dtype!r}{hint}; known: {', '.join(DTYPES)}")
        if not isinstance(self.double_quant, bool):
            problems.append(f"double_quant: expected True or False, found {self.double_quant!r}")
        elif self.double_quant and method not in COMPUTES_ALONE:
            problems.append(f"double_quant: {method} has no choice of it; leave it out")
        if problems:
            raise BadSpec(problems)

    @property
    def scheme(self) -> Scheme:
        """The scheme by which weights are encoded."""
        bits, groups = SIZES[QuantizationMethod(self.method)]
        size = self.group_size or (groups[0] if groups else 0)
        if self.method is QuantizationMethod.HQQ:
            return Hqq(self.bits or bits[0], size)  # type: ignore[arg-type]
        if self.method is QuantizationMethod.BNB_INT8:
            return LlmInt8()
        if self.method in COMPUTES_ALONE:
            return Bnb4("nf4" if self.method is QuantizationMethod.BNB_NF4 else "fp4", size, self.double_quant)
        return MlxAffine(bits[0], size)


Quantize = QuantizationConfig | QuantizationMethod | Scheme | str


def wrong_quantization(given: object) -> str | None:
    """Say why something is no quantization; None if it is one."""
    if isinstance(given, QuantizationConfig | QuantizationMethod) or hasattr(given, "engine"):
        return None
    if not isinstance(given, str):
        return f"expected a preset's name, such as 'nf4', a QuantizationConfig or a scheme; found {given!r}"
    return None if given in (PLAIN, *SCHEMES, *QuantizationMethod) else no_scheme(given)


def scheme_of(given: Quantize | None) -> Scheme | None:
    """Return the scheme that weights are quantized to."""
    if isinstance(given, str) and given in SCHEMES:
        return SCHEMES[given]
    config = QuantizationConfig(given) if isinstance(given, str) else given
    return config.scheme if isinstance(config, QuantizationConfig) else config


def no_scheme(name: str) -> str:
    """Say which schemes models are quantized to here; of a preset that is none of them, who makes it."""
    from loaders.presets.catalog import preset_names

    if name in preset_names():
        return (
            f"{name!r} is not one that a model is quantized to as it is loaded; known: {', '.join(SCHEMES)}. A job"
            " (weightmill run) writes it, and the engine loads that"
        )
    return f"{unknown_quant(name, SCHEMES)}, or a scheme"


def name_of_dtype(dtype: object) -> str | None:
    """Return the name of a dtype that is given as torch's own object; a name, or None, is returned as it is."""
    return str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype  # type: ignore[return-value]


def _or(values: tuple[int, ...]) -> str:
    return " or ".join(str(each) for each in sorted(set(values)))
