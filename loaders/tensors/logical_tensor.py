"""Logical tensors: weights by name, and how each is made from stored tensors. They are the same for every target."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from loaders.architectures.family import natural_key
from loaders.architectures.templates import KnownTraits
from loaders.dtypes import DType, Shape, row_major
from loaders.quantization.scheme import Decoder
from loaders.specs import RowOrder, TensorSpec, WeightSpec
from loaders.tensors.merged import Merge


@dataclass(frozen=True, slots=True)
class Window:
    """The elements of a tensor that make a logical one: a first element, and a stride for each dimension.

    A whole tensor, some rows, every second row, one matrix of a stack, a transpose: all are windows. Offset and strides
    count elements of the stored tensor, or of what it decodes to if it is quantized.
    """

    offset: int
    stride: Shape

    @staticmethod
    def whole(spec: WeightSpec) -> Window:
        return _whole(spec.shape, spec.stride)

    def rows(self, first: int) -> Window:
        """Return the window that begins at a row of the first dimension."""
        return replace(self, offset=self.offset + first * self.stride[0]) if first else self

    def extent(self, shape: Shape) -> tuple[int, int]:
        """Return the range of elements [start, stop) that the window's elements lie in, for a tensor of a shape."""
        if 0 in shape:
            return self.offset, self.offset
        last = sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        return self.offset, self.offset + last + 1


@lru_cache(maxsize=4096)
def _whole(shape: Shape, stride: Shape | None) -> Window:
    """Return one window for all tensors of a shape."""
    return Window(0, stride if stride is not None else row_major(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalTensor:
    """A logical tensor and its origin.

    stored: (role, stored tensor) pairs; a plain weight has one, called "weight", a quantized one has the decoder's.
    window: the elements that make this tensor; None for a quantized tensor that is all of what is decoded.
    decode: the decoder of a quantized tensor.
    role, block, group: what the family says of the tensor; see `known`.
    whole: the shape of what `window` picks from, if it differs: the decoded tensor, or the stack this is a part of.
    order: the order in which the logical tensor takes the rows, applied last.
    merge: what an adapter does to the weights that all of the above give.
    """

    name: str
    dtype: DType
    shape: Shape
    stored: tuple[tuple[str, WeightSpec], ...]
    window: Window | None
    decode: Decoder | None
    role: str = ""
    block: str = ""
    group: str | None = None
    whole: Shape | None = None
    order: RowOrder | None = None
    merge: Merge | None = None

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def source_name(self) -> str:
        """The name of the checkpoint's tensor that this is, or in an engine's form is made of."""
        return self.name

    @property
    def source_bytes(self) -> int:
        """The bytes that leave storage for this tensor; of a stack, its share."""
        # A plan asks for this several times for each tensor, of which most have one stored part.
        total = self.stored[0][1].size if len(self.stored) == 1 else sum(spec.size for _, spec in self.stored)
        return total if self.whole is None else total * self.spec.numel // max(1, math.prod(self.whole))

    @property
    def stored_as(self) -> str:
        """The kind of a quantized tensor, of llama.cpp's the type, and of any other the dtype."""
        is_kind = self.decode is not None and self.decode.kind != "ggml"
        return self.decode.kind if self.decode and is_kind else self.stored[0][1].dtype.name

    @property
    def decoded_spec(self) -> TensorSpec:
        """The spec of what the decoder decodes: this tensor, or the one of which it is a window."""
        return self.spec if self.whole is None else TensorSpec(self.name, self.dtype, self.whole)


def plain_tensor(name: str, stored: WeightSpec) -> LogicalTensor:
    """Return the logical tensor that is one stored tensor as it is."""
    return LogicalTensor(
        name=name,
        dtype=stored.dtype,
        shape=stored.shape,
        stored=(("weight", stored),),
        window=Window.whole(stored),
        decode=None,
    )


def known(tensor: LogicalTensor, traits_of: KnownTraits, beside: str | None = None) -> LogicalTensor:
    """Return the tensor with the role, block and group that its family gives it.

    `beside` names the weight that a tensor such as a scale belongs to; the tensor then gets that weight's block.
    """
    traits = traits_of(tensor.name, tensor.shape)
    block = traits.block if beside in (None, tensor.name) else traits_of(beside, tensor.shape).block
    return replace(tensor, role=traits.role, block=block, group=traits.group)


def transposed(tensor: LogicalTensor) -> LogicalTensor:
    """Return a matrix as its transpose, without moving a byte."""
    rows, columns = tensor.shape
    window = tensor.window or Window(0, row_major(tensor.shape))
    turned = Window(window.offset, window.stride[::-1])
    whole = tensor.whole or (tensor.shape if tensor.decode is not None else None)
    return replace(tensor, shape=(columns, rows), window=turned, whole=whole)


def in_natural_order(tensors: Iterable[LogicalTensor]) -> list[LogicalTensor]:
    """Return tensors sorted by block, then by name, with layer 2 before layer 10."""
    key_of_block = cache(natural_key)
    return sorted(tensors, key=lambda tensor: (key_of_block(tensor.block), natural_key(tensor.name)))


def stored_name(weight: str, role: str) -> str:
    """Return the name of a stored part: a role replaces the "weight" at the end of a name. See `Scheme.stored`."""
    if role == "weight":
        return weight
    return weight.removesuffix("weight") + role if weight.endswith("weight") else weight + role.removeprefix("weight")
