"""HQQ's weights: modules of W_q, scale, zero and metadata, in safetensors or in qmodel.pt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.quantized_by import HQQ_CODES
from loaders.containers.pytorch import read_values
from loaders.dtypes import DType, dtype_named
from loaders.errors import BadCheckpoint
from loaders.quantization.schemes.hqq import BITS, Hqq
from loaders.specs import TensorSpec, WeightSpec
from loaders.strategies import small_reader
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.base import decoded, part

NUMBERS = ("nbits", "group_size", "axis")
FACTS = (*NUMBERS, "shape", "compute_dtype")  # the items of metadata that decoding needs
LONGEST = 64  # bytes of an item that are read: "torch.bfloat16", or two sizes, take far less


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized weights, by name.

    Raises:
        BadCheckpoint: a module lacks a part, or its metadata is not one of hqq's formats that are read here.
    """
    by_name = {spec.name: spec for spec in checkpoint.weights}
    modules = [name.removesuffix(HQQ_CODES) for name in by_name if name.endswith(HQQ_CODES)]
    if checkpoint.container == "safetensors":
        said = _in_tensors(checkpoint, by_name, modules)
    else:
        said = {
            key: value for tag in checkpoint.files for key, value in read_values(checkpoint.source, tag.name).items()
        }
    return {f"{module}.weight": _tensor(by_name, said, module) for module in modules}


def _in_tensors(checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], modules: list[str]) -> dict[str, Any]:
    """Read metadata that is stored as tensors: int32, int64, and text in bytes."""
    specs = {
        f"{module}.{fact}": part(by_name, f"{module}.weight", f"{module}.{fact}")
        for module in modules
        for fact in FACTS
    }
    found: dict[str, Any] = {}
    with small_reader(checkpoint.source, list(specs.values())) as reader:
        for name, spec in specs.items():
            raw = reader.read(spec, 0, min(spec.size, LONGEST)).tobytes()
            if name.endswith(".compute_dtype"):
                found[name] = dtype_named(raw.decode("ascii", "replace"))
            else:
                step = spec.dtype.item_bytes
                numbers = [
                    int.from_bytes(raw[at : at + step], "little", signed=True) for at in range(0, len(raw), step)
                ]
                found[name] = tuple(numbers) if name.endswith(".shape") else numbers[0]
    return found


def _tensor(by_name: Mapping[str, WeightSpec], said: Mapping[str, Any], module: str) -> LogicalTensor:
    name = f"{module}.weight"
    facts: list[Any] = [said.get(f"{module}.{fact}") for fact in FACTS]
    bits, group_size, axis, shape, dtype = facts
    is_size = type(group_size) is int and group_size > 0
    is_shape = isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not (bits in BITS and axis in (0, 1) and is_size and is_shape and isinstance(dtype, DType)):
        raise BadCheckpoint(
            f"{name}: {bits} bits, groups of {group_size}, axis {axis}, shape {shape}, {dtype}: none of hqq's formats"
            f" that are read here ({', '.join(map(str, BITS))} bits, axis 0 or 1)"
        )
    scale = part(by_name, name, f"{module}.scale")
    spec = TensorSpec(name, dtype, shape)
    scheme = Hqq(bits, group_size, axis, None if dtype == scale.dtype else scale.dtype.name)
    refusal = scheme.refuses(spec)
    if refusal:
        raise BadCheckpoint(f"{name}: {refusal}")
    return decoded(by_name, spec, scheme, optional=scheme.said(spec))
