"""Checks of weights: their hash, their shapes, and which of them share memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from loaders.dtypes import Shape
from loaders.errors import BadCheckpoint
from loaders.specs import WeightSpec


def compute_weight_hash(weight: Any) -> str:
    """Return the xxh3-128 of a weight's bytes in row-major order, little endian, as 32 hex digits.

    `weight` is bytes, a numpy array, or a torch tensor on any device. Equal bits have equal hashes in each of these:
    bfloat16 as a torch tensor, as uint16 of numpy, or as the bytes of a file. Shape and dtype are not hashed.

    Raises:
        TypeError: `weight` is something else.
    """
    return xxhash.xxh3_128_hexdigest(_bytes_of(weight))


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


def validate_weight_shapes(specs: Mapping[str, WeightSpec] | Iterable[WeightSpec], expected: Mapping[str, Any]) -> None:
    """Check that weights have the names and shapes that a model expects.

    `expected` has, by name, a shape or anything with a `shape` (a torch module's `state_dict()`).

    Raises:
        BadCheckpoint: weights are missing, not expected, or of another shape; all are listed.
    """
    listed = specs.values() if isinstance(specs, Mapping) else specs
    found = {spec.name: tuple(spec.shape) for spec in listed}
    wanted: dict[str, Shape] = {name: tuple(getattr(each, "shape", each)) for name, each in expected.items()}
    wrong = [
        f"{name}: expected {list(shape)}, found {list(found[name])}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    wrong += [f"{name}: missing, expected {list(shape)}" for name, shape in wanted.items() if name not in found]
    wrong += [f"{name}: not expected, found {list(shape)}" for name, shape in found.items() if name not in wanted]
    if wrong:
        raise BadCheckpoint("\n".join([f"{len(wrong)} weights are not as expected:", *wrong]))


def filter_shared_tensors(weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each weight once, in order, and a map from the names of the others to the name that each duplicates.

    `weights` are torch tensors, numpy arrays or WeightSpecs by name. Two are duplicates if they are the same memory (or
    bytes of a file) with the same dtype, shape and strides. Equal values in other memory, and views of parts, are not.
    """
    kept: dict[str, Any] = {}
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, weight in weights.items():
        place = _place_of(weight)
        if place is not None and place in first:
            same[name] = first[place]
        else:
            kept[name] = weight
            if place is not None:
                first[place] = name
    return kept, same


def _place_of(weight: Any) -> Any:
    """Return a key that duplicates have in common; None for a weight without memory (empty, or a meta tensor)."""
    if isinstance(weight, WeightSpec):
        return (weight.file, weight.offset, weight.size, weight.dtype, weight.shape, weight.stride)
    if isinstance(weight, np.ndarray):
        return (weight.ctypes.data, weight.dtype.str, weight.shape, weight.strides) if weight.size else None
    if hasattr(weight, "untyped_storage"):
        if weight.numel() == 0 or weight.device.type == "meta":
            return None
        return (weight.device, weight.data_ptr(), weight.dtype, tuple(weight.shape), tuple(weight.stride()))
    return id(weight)
