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


@dataclass(frozen=True, slots=True)
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
        DType("BOOL", 8, "bool", "uint8"),
        DType("U8", 8, "uint8", "uint8"),
        DType("I8", 8, "int8", "int8"),
        DType("U16", 16, "uint16", "uint16"),
        DType("I16", 16, "int16", "int16"),
        DType("U32", 32, "uint32", "uint32"),
        DType("I32", 32, "int32", "int32"),
        DType("U64", 64, "uint64", "uint64"),
        DType("I64", 64, "int64", "int64"),
        DType("F64", 64, "float64", "float64", True),
        DType("F32", 32, "float32", "float32", True),
        DType("F16", 16, "float16", "float16", True),
        DType("BF16", 16, "bfloat16", "uint16", True),
        DType("C64", 64, "complex64", "complex64"),
        DType("F8_E4M3", 8, "float8_e4m3fn", "uint8"),
        DType("F8_E5M2", 8, "float8_e5m2", "uint8"),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "uint8"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "uint8"),
        DType("F8_E8M0", 8, "float8_e8m0fnu", "uint8"),
        DType("F6_E2M3", 6, "float6_e2m3fn", "uint8"),
        DType("F6_E3M2", 6, "float6_e3m2fn", "uint8"),
        DType("F4", 4, "float4_e2m1fn_x2", "uint8"),
    )
}


# ggml's block formats: numbers and bytes of a block (ggml-common.h)
GGML_BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "MXFP4": (32, 17),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66),
}  # fmt: skip


# those that are read, not written: what they hold is found with calibration data, or has scales beside it
GGML_READ_BLOCKS = {
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "NVFP4": (64, 36),
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
