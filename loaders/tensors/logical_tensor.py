"""A logical tensor and its origin: how it comes from stored ones. The same for every target of a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loaders.architectures.families import Family
from loaders.dtypes import DType, Shape, row_major
from loaders.quantization.scheme import Decoder
from loaders.specs import RowOrder, TensorSpec, WeightSpec


@dataclass(frozen=True, slots=True)
class Window:
    """Which elements of a tensor make the logical one: a first element and a stride for each dimension.

    Row-major, rows, every second row, one matrix of a stack, transposed: all are windows. They count the elements of
    the stored tensor, or where it is quantized those of what it decodes to.
    """

    offset: int
    stride: Shape

    @staticmethod
    def whole(spec: WeightSpec) -> Window:
        return Window(0, spec.stride if spec.stride is not None else row_major(spec.shape))


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A logical tensor and its origin.

    `stored` maps roles to stored tensors: plain weights have one, called "weight"; a quantized one has those of the
    decoder in `decode`. `whole` is the shape of the tensor that `window` shows elements of, where that is another one:
    the decoded tensor, or the stack this is a part of; a quantized tensor without a window is all of what is decoded.
    `role`, `block` and `group` are what the family says of it: see `known`. `order` is that in which the tensor takes
    the rows of all this.
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

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def source_bytes(self) -> int:
        """Bytes that leave storage for this tensor: of a stack, its share."""
        total = sum(spec.size for _, spec in self.stored)
        return total if self.whole is None else total * self.spec.numel // max(1, math.prod(self.whole))

    @property
    def decoded_spec(self) -> TensorSpec:
        """What the decoder decodes: this tensor, or the one it is a window of."""
        return self.spec if self.whole is None else TensorSpec(self.name, self.dtype, self.whole)


def plain_tensor(name: str, stored: WeightSpec) -> LogicalTensor:
    """A stored tensor that is a logical one as it is."""
    return LogicalTensor(name, stored.dtype, stored.shape, (("weight", stored),), Window.whole(stored), None)


def known(tensor: LogicalTensor, family: Family, beside: str | None = None) -> LogicalTensor:
    """The tensor with what its family says of it; one that only goes along with another has the block of that one."""
    traits = family.traits(tensor.name, tensor.shape)
    block = traits.block if beside is None else family.traits(beside, tensor.shape).block
    return replace(tensor, role=traits.role, block=block, group=traits.group)


def stored_name(weight: str, role: str) -> str:
    """The name of a stored part: roles begin with "weight" and stand in its place. See `Scheme.stored`."""
    return weight.removesuffix("weight") + role if weight.endswith("weight") else weight + role.removeprefix("weight")
