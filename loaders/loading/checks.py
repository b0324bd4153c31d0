"""Small questions about weights in memory: their hash, their shapes, which of them are the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from loaders.dtypes import Shape
from loaders.errors import BadCheckpoint
from loaders.specs import WeightSpec


def compute_weight_hash(weight: Any) -> str:
    """xxh3-128 of a weight's bytes in row-major order, little endian: 32 hex digits.

    `weight`: bytes, a numpy array, a torch tensor on any device. Equal bits have equal hashes, whatever held them:
    bfloat16 as torch's tensor, as numpy's uint16 or as the bytes of a file. Shape and dtype do not count.

    Raises:
        TypeError: it is something else.
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
    """Check that weights are those that a model expects.

    `expected`: by name, a shape or anything that has one (a torch module's `state_dict()`).

    Raises:
        BadCheckpoint: some are missing, some are not expected, some have another shape; every one is listed.
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
    """Every weight once: those to keep, in order, and the names of the others with the name each is the same as.

    `weights`: torch tensors, numpy arrays or WeightSpecs by name. The same are those that take the same memory (of a
    file, for specs) in the same way; equal values in other memory, and parts of one another, are not.
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
    """What two weights that are the same have in common; None where there is nothing to compare (no bytes)."""
    if isinstance(weight, WeightSpec):
        return (weight.file, weight.offset, weight.size, weight.dtype, weight.shape, weight.stride)
    if isinstance(weight, np.ndarray):
        return (weight.ctypes.data, weight.dtype.str, weight.shape, weight.strides) if weight.size else None
    if hasattr(weight, "untyped_storage"):
        if weight.numel() == 0 or weight.device.type == "meta":
            return None
        return (weight.device, weight.data_ptr(), weight.dtype, tuple(weight.shape), tuple(weight.stride()))
    return id(weight)
