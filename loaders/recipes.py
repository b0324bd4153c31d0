"""Recipes: how a logical tensor comes from stored ones. The source half of a plan, the same for every target."""

from __future__ import annotations

from dataclasses import dataclass

from loaders.quantization.scheme import Scheme
from loaders.specs import DType, RowOrder, Shape, TensorSpec, WeightSpec, row_major


@dataclass(frozen=True, slots=True)
class Window:
    """Which elements of a stored tensor make the logical one: a first element and a stride for each dimension.

    Row-major, rows, every second row, transposed: all are windows.
    """

    offset: int
    stride: Shape

    @staticmethod
    def whole(spec: WeightSpec) -> Window:
        return Window(0, spec.stride if spec.stride is not None else row_major(spec.shape))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A logical tensor and its origin.

    `stored` maps roles to stored tensors: plain weights have one, called "weight"; a quantized one has those of the
    scheme in `decode`. `role`, `block` and `group` are what the family says of it. `order` is that in which the logical
    tensor takes the rows of what is stored.
    """

    name: str
    dtype: DType
    shape: Shape
    stored: tuple[tuple[str, WeightSpec], ...]
    window: Window | None
    decode: Scheme | None
    role: str
    block: str
    group: str | None
    order: RowOrder | None = None

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def source_bytes(self) -> int:
        """Bytes that leave storage for this tensor."""
        return sum(spec.size for _, spec in self.stored)


def stored_name(weight: str, role: str) -> str:
    """The name of a stored part: roles begin with "weight" and stand in its place. See `Scheme.stored`."""
    return weight.removesuffix("weight") + role if weight.endswith("weight") else weight + role.removeprefix("weight")
