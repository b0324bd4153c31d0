"""Blocks of ggml's types as float32, whichever type it is: by the kernels here, or by the gguf package's tables.

The IQ types hold indexes into lattices of some thousand points, which llama.cpp and its gguf package keep as tables;
they are read with that package (its decoding is checked bit for bit against ggml's), some blocks at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loaders.dtypes import DTYPES, GGML_READ_BLOCKS
from loaders.errors import BadSpec
from loaders.quantization.kernels.ggml.decode import DECODERS

NUMBERS = 1 << 16  # decoded at a time: numpy makes several arrays of so many


def check_readable(name: str) -> None:
    """Raises BadSpec: blocks of this type cannot be decoded here."""
    if name not in DECODERS:
        _reader(name)


def decode_blocks(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Whole blocks, uint8, to their weights, float32.

    Raises:
        BadSpec: the type needs the gguf package, which is not there.
    """
    if name in DECODERS:
        DECODERS[name](data, out)
        return
    reader, dtype = _reader(name), DTYPES[name]
    block = dtype.size((dtype.block,))
    step = NUMBERS // dtype.block
    for at in range(0, out.size // dtype.block, step):
        part = data[at * block : (at + step) * block]
        with np.errstate(all="ignore"):
            out[at * dtype.block : (at + step) * dtype.block] = reader(part).reshape(-1)


def _reader(name: str) -> Any:
    assert name in GGML_READ_BLOCKS, name
    try:
        import gguf
    except ImportError:
        raise BadSpec(f"weights of ggml's type {name} are decoded with the gguf package; pip install gguf") from None
    kind = getattr(gguf.GGMLQuantizationType, name, None)
    if kind is None or kind not in gguf.quants._type_traits:
        raise BadSpec(f"the gguf package that is installed does not decode ggml's type {name}; pip install -U gguf")
    return lambda data: gguf.quants.dequantize(data, kind)
