"""BitNet's packed ternary weights, each with a weight_scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint
from loaders.quantization.schemes.bitnet import Ternary
from loaders.specs import TensorSpec, WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.base import decoded, part


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized weights, by name.

    Raises:
        BadCheckpoint: a weight is not whole.
    """
    by_name = {spec.name: spec for spec in checkpoint.weights}
    weights = (name.removesuffix("_scale") for name in by_name if name.endswith(".weight_scale"))
    return {weight: _tensor(checkpoint, by_name, weight) for weight in weights}


def _tensor(checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], name: str) -> LogicalTensor:
    packed = part(by_name, name, name)
    if len(packed.shape) != 2:
        raise BadCheckpoint(f"{name}: expected packed ternary rows, found shape {list(packed.shape)}")
    # Of a config that has none, the weights alone say the method.
    block = checkpoint.config.get("quantization_config") or {}
    linear_class: Any = block.get("linear_class") or "bitlinear"
    shape = (packed.shape[0] * 4, packed.shape[1])
    return decoded(by_name, TensorSpec(name, by_name[name + "_scale"].dtype, shape), Ternary(linear_class))
