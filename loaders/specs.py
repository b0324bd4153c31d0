"""What a tensor is, known without its weights: dtypes, stored tensors, logical tensors.

Dtype names are those of safetensors. Raw weights travel as numpy arrays of a dtype's `storage`: bfloat16 and the eight
bit floats, which numpy lacks, as unsigned integers. A dtype of less than a byte travels as bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loaders.dtypes import DTYPES, GGML_BLOCKS, GGML_READ_BLOCKS, DType, Shape

DTYPES |= {
    name: DType(name=name, bits=8 * size, torch=name.lower(), storage="uint8", block=n)
    for name, (n, size) in (GGML_BLOCKS | GGML_READ_BLOCKS).items()
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A logical tensor: name, dtype, shape."""

    name: str
    dtype: DType
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.size(self.shape)

    @property
    def num_items(self) -> int:
        """Storage items: what ranges of a view count."""
        return self.size // self.dtype.item_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """A stored tensor, known from headers alone.

    `offset` and `size` are the bytes it spans in `file` (relative to the checkpoint). `stride` counts elements and is
    None for row-major; `alias` names the tensor whose bytes it shares (PyTorch files only).
    """

    name: str
    dtype: DType
    shape: Shape
    file: str
    offset: int
    size: int
    stride: Shape | None = None
    alias: str | None = None

    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RowOrder:
    """The rows of each head in another order: halves interleaved, or with `inverse` put back.

    Row 2j + t of a head is its row t * size/2 + j, for t 0 and 1: what rotary embeddings of pairs want, where those of
    transformers rotate halves. `size` counts the rows of a head.
    """

    size: int
    inverse: bool = False


@dataclass(frozen=True, slots=True)
class StoredSpec:
    """A tensor that a scheme stores for a weight.

    `constant` holds its bytes where they do not depend on weights. `is_bound` marks a length that depends on values:
    the shape is then the greatest.
    """

    dtype: DType
    shape: Shape
    constant: bytes | None = None
    is_bound: bool = False

    @property
    def size(self) -> int:
        return self.dtype.size(self.shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that an output will hold: the name its engine looks for, and what it is.

    Where the engine stacks several into one, `whole` is what it looks for under the name, and this one's bytes begin at
    `offset` of it. `place` is for a tensor that its consumer looks for in a file of its own, at a byte of it.
    """

    name: str
    spec: StoredSpec
    whole: StoredSpec | None = None
    offset: int = 0
    place: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The place of a stored tensor among a file's data, in bytes; at the latest there, if lengths before it vary.

    `within` is set for a part of a stacked tensor: that tensor's name, and where the part begins in it. The part's own
    name is then its and the offset's: "experts.weight@4096".
    """

    name: str
    dtype: DType
    shape: Shape
    offset: int
    is_bound: bool = False
    within: tuple[str, int] | None = None

    @property
    def size(self) -> int:
        return self.dtype.size(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file of an output, exactly: the bytes before its data, its data, what follows, every tensor's slot in order.

    `data_bytes` run from the first tensor to the end of the last, with what the container puts between them. `about` is
    what the file says beside its tensors, where its container has a place for that. A piece is no file of the output
    but a range of one: `within` names that file, and says where in it the piece begins.
    """

    name: str
    header_bytes: int
    data_bytes: int
    slots: tuple[Slot, ...]
    container: str
    tail_bytes: int = 0
    about: Any = None
    within: tuple[str, int] | None = None

    @property
    def size(self) -> int:
        """Bytes, or at most so many where a slot is bound."""
        return self.header_bytes + self.data_bytes + self.tail_bytes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors alone, or at most so many."""
        return sum(slot.size for slot in self.slots)
