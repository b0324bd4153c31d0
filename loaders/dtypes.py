"""The table of dtypes: names, sizes and block lengths of what checkpoints store."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loaders.errors import BadCheckpoint

Shape = tuple[int, ...]


def row_major(shape: Shape) -> Shape:
    """The strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def is_contiguous(shape: Shape, stride: Shape) -> bool:
    """Whether the elements lie in row-major order without gaps; dimensions of one do not count."""
    wanted = row_major(shape)
    return all(n == 1 or s == w for n, s, w in zip(shape, stride, wanted, strict=True)) or 0 in shape


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """A number format: its safetensors name, size in bits, the name torch uses, and how numpy holds it.

    Formats of ggml store `block` numbers together, in `bits` for all of them; blocks do not cross rows.
    """

    name: str
    bits: int
    torch: str
    storage: str
    is_float: bool = False
    block: int = 1

    @property
    def item_bytes(self) -> int:
        """Bytes of one storage item: of a number, or 1 where a number has no bytes of its own."""
        return max(1, self.bits // 8) if self.block == 1 else 1

    @property
    def is_integer(self) -> bool:
        """Whether it counts or marks things, so that a tensor of it holds no parameters of a model."""
        return self.torch.startswith(("int", "uint", "bool"))

    def size(self, shape: Shape) -> int:
        """Bytes of a tensor of this dtype.

        Raises:
            BadCheckpoint: the tensor would end within a byte, or a row within a block.
        """
        if self.block > 1 and (not shape or shape[-1] % self.block):
            raise BadCheckpoint(f"{self.name} {list(shape)} does not divide into blocks of {self.block}")
        bits = math.prod(shape) * self.bits
        if bits % (8 * self.block):
            raise BadCheckpoint(f"{self.name} {list(shape)} does not fill whole bytes")
        return bits // (8 * self.block)

    def __str__(self) -> str:
        return self.name


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType(name="BOOL", bits=8, torch="bool", storage="uint8"),
        DType(name="U8", bits=8, torch="uint8", storage="uint8"),
        DType(name="I8", bits=8, torch="int8", storage="int8"),
        DType(name="U16", bits=16, torch="uint16", storage="uint16"),
        DType(name="I16", bits=16, torch="int16", storage="int16"),
        DType(name="U32", bits=32, torch="uint32", storage="uint32"),
        DType(name="I32", bits=32, torch="int32", storage="int32"),
        DType(name="U64", bits=64, torch="uint64", storage="uint64"),
        DType(name="I64", bits=64, torch="int64", storage="int64"),
        DType(name="F64", bits=64, torch="float64", storage="float64", is_float=True),
        DType(name="F32", bits=32, torch="float32", storage="float32", is_float=True),
        DType(name="F16", bits=16, torch="float16", storage="float16", is_float=True),
        DType(name="BF16", bits=16, torch="bfloat16", storage="uint16", is_float=True),
        DType(name="C64", bits=64, torch="complex64", storage="complex64"),
        DType(name="F8_E4M3", bits=8, torch="float8_e4m3fn", storage="uint8"),
        DType(name="F8_E5M2", bits=8, torch="float8_e5m2", storage="uint8"),
        DType(name="F8_E4M3FNUZ", bits=8, torch="float8_e4m3fnuz", storage="uint8"),
        DType(name="F8_E5M2FNUZ", bits=8, torch="float8_e5m2fnuz", storage="uint8"),
        DType(name="F8_E8M0", bits=8, torch="float8_e8m0fnu", storage="uint8"),
        DType(name="F6_E2M3", bits=6, torch="float6_e2m3fn", storage="uint8"),
        DType(name="F6_E3M2", bits=6, torch="float6_e3m2fn", storage="uint8"),
        DType(name="F4", bits=4, torch="float4_e2m1fn_x2", storage="uint8"),
    )
}


# ggml's block formats, with the weights and bytes of a block (ggml-common.h).
GGML_BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "MXFP4": (32, 17),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip


# Block formats that are only read: their codes come from calibration or training, or their scales are tensors apart.
GGML_READ_BLOCKS = {
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18),
}  # fmt: skip


BY_TORCH_NAME = {dtype.torch: dtype for dtype in DTYPES.values()}


WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")  # what a quantizer takes


def dtype_named(name: str) -> DType:
    """Look up a dtype by its safetensors or torch name ("BF16", "bfloat16").

    Raises:
        BadCheckpoint: no such dtype.
    """
    found = DTYPES.get(name) or BY_TORCH_NAME.get(name.removeprefix("torch."))
    if found is None:
        raise BadCheckpoint(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return found


def storage_of(dtype: DType) -> np.dtype:
    """The numpy dtype that holds raw weights of `dtype`."""
    return np.dtype(dtype.storage)


def shortest_decimal(value: float) -> float:
    """Return the number of the fewest digits that is this one in float32: 1e-05 for 9.99999974737875e-06.

    A number that is none of float32's stays as it is.
    """
    return float(str(np.float32(value))) if np.float32(value) == value else value
