"""Checks of weights: their hash, their shapes, and which of them share memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from loaders.dtypes import Shape
from loaders.errors import BadCheckpoint
from loaders.specs import WeightSpec


def compute_weight_hash(data: Any) -> str:
    """Return the xxh3-128 of a weight's bytes in row-major order, little endian, as 32 hex digits.

    `data` is bytes, a numpy array, or a torch tensor on any device. Equal bits have equal hashes in each of these:
    bfloat16 as a torch tensor, as uint16 of numpy, or as the bytes of a file. Shape and dtype are not hashed.

    Raises:
        TypeError: `data` is something else.
    """
    return xxhash.xxh3_128_hexdigest(_bytes_of(data))


def _bytes_of(weight: Any) -> Any:
    if isinstance(weight, bytes | bytearray | memoryview):
        return weight
    if isinstance(weight, np.ndarray):
        little = weight.astype(weight.dtype.newbyteorder("<"), copy=False)
        return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data
    if type(weight).__module__.partition(".")[0] == "torch" or hasattr(weight, "untyped_storage"):
        import torch

        flat = weight.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data
    raise TypeError(f"expected bytes, a numpy array or a torch tensor, found {type(weight).__name__}")


def validate_weight_shapes(specs: Any, expected: Any) -> None:
    """Check that weights have the names and shapes that a model expects.

    specs: WeightSpecs, or mappings with "name" and "shape", in a list or by name.
    expected: by name, a shape or anything with a `shape` (a torch module's `state_dict()`); or as `specs`.

    Raises:
        BadCheckpoint: weights are missing, not expected, or of another shape; all are listed.
    """
    found, wanted = _shapes(specs), _shapes(expected)
    wrong = [
        f"{name}: expected {list(shape)}, found {list(found[name])}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    wrong += [f"{name}: missing, expected {list(shape)}" for name, shape in wanted.items() if name not in found]
    wrong += [f"{name}: not expected, found {list(shape)}" for name, shape in found.items() if name not in wanted]
    if wrong:
        raise BadCheckpoint("\n".join([f"{len(wrong)} weights are not as expected:", *wrong]))


def _shapes(given: Any) -> dict[str, Shape]:
    """Return shapes by name."""
    if not isinstance(given, Mapping):
        given = {each["name"] if isinstance(each, Mapping) else each.name: each for each in given}
    shapes = {name: each["shape"] if isinstance(each, Mapping) else each for name, each in given.items()}
    return {name: tuple(getattr(each, "shape", each)) for name, each in shapes.items()}


# The names under which some libraries have these two in a compiled module.
compute_weight_hash_rust = compute_weight_hash
validate_weight_shapes_rust = validate_weight_shapes


class UnsharedTensors(dict[str, Any]):
    """Tensors by name, of which no two are the same memory. `same` has, for each name that was left out, the name of
    the tensor that is kept and has its bytes.
    """

    def __init__(self, kept: Mapping[str, Any], same: Mapping[str, str]) -> None:
        super().__init__(kept)
        self.same = dict(same)


def filter_shared_tensors(tensors: Mapping[str, Any]) -> UnsharedTensors:
    """Return the tensors of which one a shared storage is kept, in order, as a dict.

    `tensors` are torch tensors, numpy arrays or WeightSpecs by name. One is left out if all its bytes are those of
    another that is kept: the same memory (or bytes of a file), whatever the shape, dtype and strides, or a view of a
    part of it. Of equals the first is kept. Tensors that share a storage but no bytes, as two halves of a buffer do,
    are all kept, and so are equal values in other memory.
    """
    extents = {name: extent for name, each in tensors.items() if (extent := _extent(each)) is not None}
    order = {name: index for index, name in enumerate(tensors)}
    # From the lowest byte on, the longest first: what covers a tensor comes before it.
    ranked = sorted(
        extents, key=lambda name: (*extents[name].place, -extents[name].stop, not extents[name].is_dense, order[name])
    )
    same: dict[str, str] = {}
    cover: str | None = None
    exact: dict[Any, str] = {}
    for name in ranked:
        mine, over = extents[name], None if cover is None else extents[cover]
        if over is not None and over.place[0] == mine.place[0] and mine.stop <= over.stop:
            same[name] = str(cover)
        elif (first := exact.setdefault(mine, name)) != name:
            same[name] = first
        elif mine.is_dense:
            cover = name
    return UnsharedTensors({name: each for name, each in tensors.items() if name not in same}, same)


@dataclass(frozen=True)
class Extent:
    """The bytes from the first to the last of a tensor: `place` is where (a device, a file) and the first byte.

    `is_dense` says that all bytes between belong to it; `steps` tells apart tensors that are not.
    """

    place: tuple[str, int]
    stop: int
    is_dense: bool
    steps: Any = None


def _extent(weight: Any) -> Extent | None:
    """Return a tensor's extent; None for one without memory (empty, or a meta tensor)."""
    if isinstance(weight, WeightSpec):
        return Extent((weight.file, weight.offset), weight.offset + weight.size, True) if weight.size else None
    if isinstance(weight, np.ndarray):
        return (
            _extent_of("", weight.ctypes.data, weight.itemsize, weight.shape, weight.strides) if weight.size else None
        )
    if hasattr(weight, "untyped_storage"):
        if weight.numel() == 0 or weight.device.type == "meta":
            return None
        item = weight.element_size()
        strides = tuple(step * item for step in weight.stride())
        return _extent_of(str(weight.device), weight.data_ptr(), item, tuple(weight.shape), strides)
    return Extent((f"object {id(weight)}", 0), 0, False)


def _extent_of(where: str, first: int, item: int, shape: Shape, strides: Shape) -> Extent:
    """Return the extent of elements of `item` bytes, the first at an address; strides are in bytes."""
    steps = [step * (size - 1) for step, size in zip(strides, shape, strict=True)]
    start = first + sum(step for step in steps if step < 0)
    stop = first + item + sum(step for step in steps if step > 0)
    reach = item  # of the elements so far, from the innermost dimension outwards
    for step, size in sorted((abs(step), size) for step, size in zip(strides, shape, strict=True) if size > 1):
        if step != reach:
            return Extent((where, start), stop, False, (item, shape, strides))
        reach = step * size
    return Extent((where, start), stop, True)
