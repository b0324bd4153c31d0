"""Stored bytes as arrays: numpy's, torch's on a device, or mlx's. Bytes that can be used in place are not copied."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from loaders.dtypes import DTYPES, DType, Shape, is_contiguous, storage_of
from loaders.errors import BadSpec
from loaders.specs import WeightSpec

log = logging.getLogger("weightmill")
Placer = Callable[[np.ndarray, WeightSpec], Any]
# dtypes that a device does not have, and what weights become on it instead
INSTEAD = {"mps": {"BF16": "F16", "F64": "F32"}, "mlx": {"F64": "F32"}}
REFUSED = {"mps": ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")}


def placer(device: str | None) -> Placer:
    """Return a function that makes an array on the device from a stored tensor's bytes; None is numpy.

    Raises:
        BadSpec: this machine has no such device, or its library is not installed.
    """
    if device is None:
        return as_numpy
    if device == "mlx":
        return _mlx_placer()
    return _torch_placer(device)


def gathered(raw: np.ndarray, spec: WeightSpec) -> np.ndarray:
    """Return the bytes of a tensor in row-major order; they are copied only if it is stored in another order."""
    if spec.stride is None or is_contiguous(spec.shape, spec.stride):
        return raw
    storage = storage_of(spec.dtype)
    items = raw[: raw.size // storage.itemsize * storage.itemsize].view(storage)
    strides = tuple(step * storage.itemsize for step in spec.stride)
    inside = np.lib.stride_tricks.as_strided(items, spec.shape, strides, writeable=False)
    return np.ascontiguousarray(inside).reshape(-1).view(np.uint8)


def storage_shape(dtype: DType, shape: Shape) -> Shape:
    """Return a tensor's shape in storage items. Formats of less than a byte, and blocks, have rows of bytes.

    Where a row does not fill whole bytes, the shape is flat.
    """
    if dtype.block == 1 and dtype.bits >= 8:
        return shape
    *rows, columns = shape or (1,)
    bits = columns * dtype.bits
    whole = bits % (8 * dtype.block) == 0
    return (*rows, bits // (8 * dtype.block)) if whole else (dtype.size(shape),)


def as_numpy(raw: np.ndarray, spec: WeightSpec) -> np.ndarray:
    """View uint8 bytes as an array of the dtype's storage."""
    return raw.view(storage_of(spec.dtype)).reshape(storage_shape(spec.dtype, spec.shape))


def allowed_dtype(device: str, dtype: DType) -> DType:
    """Return the dtype in which a device ("mps", "mlx", ...) holds a tensor: mostly the tensor's own.

    Raises:
        BadSpec: the device has no dtype that could stand for it.
    """
    if dtype.name in REFUSED.get(device, ()):
        raise BadSpec(f"device={device}: it has no {dtype.torch}; load to device=cpu, or decode on the way")
    return DTYPES[INSTEAD.get(device, {}).get(dtype.name, dtype.name)]


class Told:
    """A loader's warnings that a dtype becomes another on the device, each given once."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._said: set[str] = set()

    def dtype(self, dtype: DType) -> DType:
        allowed = allowed_dtype(self._device, dtype)
        if allowed != dtype and dtype.name not in self._said:
            self._said.add(dtype.name)
            log.warning("device=%s: it has no %s; weights become %s", self._device, dtype.torch, allowed.torch)
        return allowed


def _torch_placer(device: str) -> Placer:
    from loaders.backends.devices import torch_device

    torch, target = torch_device(device)
    told = Told(target.type)

    def place(raw: np.ndarray, spec: WeightSpec) -> Any:
        tensor = as_torch(raw, spec)
        if target.type == "cpu":
            return tensor
        wanted = told.dtype(spec.dtype)
        return (tensor if wanted == spec.dtype else tensor.to(getattr(torch, wanted.torch))).to(target)

    return place


def as_torch(raw: np.ndarray, spec: WeightSpec) -> Any:
    """View uint8 bytes as a torch tensor over the same memory. Read-only and unaligned memory is copied.

    torch has no read-only tensors, and needs elements at multiples of their size.
    """
    import torch

    if not raw.flags.writeable or raw.ctypes.data % spec.dtype.item_bytes:
        raw = raw.copy()
    return shaped(torch.from_numpy(raw), spec)


def shaped(flat: Any, spec: WeightSpec) -> Any:
    """View a flat torch tensor of bytes, on any device, in a tensor's dtype and shape.

    Formats of ggml, and others of less than a byte, stay bytes.
    """
    import torch

    kind = getattr(torch, spec.dtype.torch, None)
    # torch 2.13 refuses to view an empty tensor as a wider dtype.
    if flat.numel() == 0:
        return torch.empty(spec.shape, dtype=kind or torch.uint8, device=flat.device)
    if spec.dtype.block > 1 or spec.dtype.bits < 8 or kind is None:
        return flat.reshape(storage_shape(spec.dtype, spec.shape))
    return flat.view(kind).reshape(spec.shape)


def _mlx_placer() -> Placer:
    from loaders.backends.devices import mlx_core

    mx = mlx_core()
    told = Told("mlx")

    def place(raw: np.ndarray, spec: WeightSpec) -> Any:
        array = as_numpy(raw, spec)
        wanted = told.dtype(spec.dtype)
        if spec.dtype.name == "BF16":
            return mx.array(array).view(mx.bfloat16)
        if spec.dtype.name == "BOOL":
            return mx.array(array.view(np.bool_))
        return mx.array(array if wanted == spec.dtype else array.astype(storage_of(wanted)))

    return place
