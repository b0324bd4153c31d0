"""Descriptions of tensors without their weights: logical tensors, stored tensors, and their places in output files.

Dtype names are those of safetensors. Raw weights are numpy arrays of a dtype's `storage`: bfloat16 and the 8-bit
floats, which numpy lacks, are unsigned integers of the same size, and dtypes of less than a byte are uint8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loaders.dtypes import DTYPES, GGML_BLOCKS, GGML_READ_BLOCKS, DType, Shape

# GGML's block formats are dtypes like the others, so that every container, plan and report treats them alike.
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
        """The size in bytes."""
        return self.dtype.size(self.shape)

    @property
    def num_items(self) -> int:
        """The number of storage items, which is the unit of a view's ranges."""
        return self.size // self.dtype.item_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """A stored tensor of a checkpoint, as a header describes it.

    Its bytes are `size` bytes from `offset` in `file`, a name relative to the checkpoint. `stride` counts elements, and
    is None for row-major order. `alias` names the tensor whose bytes it shares (PyTorch files only). `own_name` is the
    name in the file, where that is another.
    """

    name: str
    dtype: DType
    shape: Shape
    file: str
    offset: int
    size: int
    stride: Shape | None = None
    alias: str | None = None
    own_name: str | None = None

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RowOrder:
    """A permutation of the rows of each attention head, for rotary embeddings (RoPE): the two halves interleaved.

    Row 2j + t of a head becomes its row t * size/2 + j, for t in (0, 1), where `size` is the rows of a head. llama.cpp
    rotates neighbouring pairs, transformers rotates halves. `inverse` undoes the permutation.
    """

    size: int
    inverse: bool = False


@dataclass(frozen=True, slots=True)
class StoredSpec:
    """A tensor that a scheme stores for a weight: its dtype and shape.

    `constant` holds the bytes if they do not depend on weights. `is_bound` marks a tensor whose length depends on
    values; its shape is then the largest possible.
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
    """A tensor of an output: the name that the engine looks for, its dtype and shape.

    Where the engine stacks several tensors into one, `whole` describes the stack, and this tensor's bytes begin at byte
    `offset` of it. `place` is (file name, byte offset) for a tensor that the engine expects at a fixed place.
    """

    name: str
    spec: StoredSpec
    whole: StoredSpec | None = None
    offset: int = 0
    place: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The place of a stored tensor in a file's data section.

    `offset` is in bytes; if tensors of variable length come before, it is the largest possible. `within` is set for a
    part of a stacked tensor: the stack's name, and the part's byte offset in it. The part itself is then named by both,
    such as "experts.weight@4096".
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
    """The exact layout of an output file: header, data section with the slots of its tensors in order, tail.

    `data_bytes` includes the container's padding between tensors. `about` is metadata for containers that store some,
    such as GGUF. A piece is not a file of the output but a byte range of one: `within` is that file's name and the
    piece's byte offset in it.
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
        """The file's size in bytes; an upper bound if a slot `is_bound`."""
        return self.header_bytes + self.data_bytes + self.tail_bytes

    @property
    def tensor_bytes(self) -> int:
        """The bytes of the tensors without header, padding and tail; an upper bound if a slot `is_bound`."""
        return sum(slot.size for slot in self.slots)
