"""bitsandbytes' weights: 4-bit ones, each described by its own quant_state, and int8 ones with their SCB."""

from __future__ import annotations

from collections.abc import Mapping

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.quantized_by import BNB_STATE
from loaders.dtypes import dtype_named
from loaders.errors import BadCheckpoint
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4, read_state
from loaders.quantization.schemes.bitsandbytes_int8 import FORMAT, SCALES, LlmInt8
from loaders.specs import TensorSpec, WeightSpec
from loaders.strategies import small_reader
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.base import decoded, expect, float_dtype, part, undecoded


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized weights, by name.

    Raises:
        BadCheckpoint: a weight is not whole, or in a form that only old GPU versions wrote.
    """
    by_name = {spec.name: spec for spec in checkpoint.weights}
    named = {match[1]: by_name[name] for name in by_name if (match := BNB_STATE.match(name))}
    found = _four_bit(checkpoint, by_name, named)
    scaled = [name.removesuffix(SCALES) + "weight" for name in by_name if name.endswith("." + SCALES)]
    coded = [spec.name for spec in checkpoint.weights if spec.dtype.name == "I8" and spec.name.endswith(".weight")]
    return found | {name: _int8(checkpoint, by_name, name) for name in dict.fromkeys([*scaled, *coded])}


def _four_bit(
    checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], named: Mapping[str, WeightSpec]
) -> dict[str, LogicalTensor]:
    """Return 4-bit weights from their states by the weights' names. Each file is opened once, and no two at a time."""
    by_file: dict[str, dict[str, WeightSpec]] = {}
    for name, spec in named.items():
        by_file.setdefault(spec.file, {})[name] = spec
    found: dict[str, LogicalTensor] = {}
    for specs in by_file.values():
        with small_reader(checkpoint.source, list(specs.values())) as reader:
            for name, spec in specs.items():
                found[name] = _tensor(by_name, name, reader.read(spec, 0, spec.size).tobytes())
    return {name: found[name] for name in named}


def _int8(checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], name: str) -> LogicalTensor:
    module = name.removesuffix("weight")
    weight, scales = part(by_name, name, name), part(by_name, name, module + SCALES)
    rows = weight.shape[0] if weight.shape else 0
    if weight.dtype.name != "I8" or len(weight.shape) != 2:
        raise BadCheckpoint(f"{name}: expected I8 [R, C] beside its SCB, found {weight.dtype} {list(weight.shape)}")
    expect(scales, ("F32",), (rows, 1) if len(scales.shape) == 2 else (rows,), f"for {name}")
    order = by_name.get(module + FORMAT)
    if order is not None:
        with small_reader(checkpoint.source, (order,)) as reader:
            if reader.read(order, 0, order.size).any():
                raise BadCheckpoint(
                    f"{order.name}: only 0, rows as they are, is read; it was made by an old bitsandbytes on a GPU:"
                    " load and save it with a newer one"
                )
    spec = TensorSpec(name, float_dtype(checkpoint), weight.shape)
    return undecoded(spec, LlmInt8(), {"weight": weight, SCALES: scales}, by_name)


def _tensor(by_name: Mapping[str, WeightSpec], name: str, raw: bytes) -> LogicalTensor:
    state = read_state(raw, name)
    packed = part(by_name, name, name)
    storage = "uint8" if packed.dtype.name == "U8" else packed.dtype.torch
    scheme = Bnb4(state["quant_type"], state["blocksize"], "nested_offset" in state, storage)
    dtype, shape = dtype_named(state["dtype"]), tuple(state["shape"])
    return decoded(by_name, TensorSpec(name, dtype, shape), scheme)
