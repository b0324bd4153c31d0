"""The decoder of blocks of any of ggml's types to float32, by the project's kernels or by the gguf package.

IQ1 to IQ3 hold indexes into lattices of up to some thousand points, which llama.cpp and its gguf package keep as
tables. They are decoded with that package, some blocks at a time; its own tests check its decoding bit for bit against
ggml's (gguf-py/tests/test_quants.py in llama.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loaders.dtypes import DTYPES, GGML_BLOCKS, GGML_READ_BLOCKS
from loaders.errors import BadSpec
from loaders.missing import needed_for
from loaders.quantization.scheme import Stored, Work
from loaders.specs import TensorSpec

DECODED_HERE = (*GGML_BLOCKS, "NVFP4", "Q1_0", "Q2_0")  # by kernels; the others by the gguf package
NUMBERS = 1 << 16  # weights that gguf decodes at a time: it makes several arrays of that size


@dataclass(frozen=True)
class GgmlScaled:
    """Blocks times a float32 beside them, `scale`: what NVFP4's scales share, or what a trained model multiplies by."""

    kind: ClassVar[str] = "ggml"
    type: str

    def align(self, spec: TensorSpec) -> int:
        return DTYPES[self.type].block

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        dtype = DTYPES[self.type]
        decode_blocks(self.type, stored.read("weight", dtype.size((start,)), dtype.size((stop,))), out)
        out *= stored.read("scale", 0, 1)[0]


def check_readable(name: str) -> None:
    """Raise BadSpec if blocks of this type cannot be decoded here."""
    if name not in DECODED_HERE:
        _reader(name)


def decode_blocks(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Decode whole blocks, uint8, to their weights, float32.

    Raises:
        BadSpec: the type needs the gguf package, which is not there.
    """
    if name in DECODED_HERE:
        from loaders.quantization.kernels.ggml.decode import DECODERS
        from loaders.quantization.kernels.ggml.decode_read_only import READ_DECODERS

        (DECODERS | READ_DECODERS)[name](data, out)
        return
    reader, dtype = _reader(name), DTYPES[name]
    block = dtype.size((dtype.block,))
    step = NUMBERS // dtype.block
    for at in range(0, out.size // dtype.block, step):
        part = data[at * block : (at + step) * block]
        # A block's scale may be any float16, NaN and infinities included; the caller counts what comes out.
        with np.errstate(all="ignore"):
            out[at * dtype.block : (at + step) * dtype.block] = reader(part).reshape(-1)


def _reader(name: str) -> Any:
    """Return the gguf package's decoder of a type."""
    assert name in GGML_READ_BLOCKS, name
    with needed_for(f"decoding weights of ggml's type {name}"):
        import gguf
    kind = getattr(gguf.GGMLQuantizationType, name, None)
    if kind is None or kind not in gguf.quants._type_traits:
        raise BadSpec(f"the gguf package that is installed does not decode ggml's type {name}; pip install -U gguf")
    return lambda data: gguf.quants.dequantize(data, kind)
