"""Checkpoints that are already quantized: which weights are, and what decodes each. One file per format."""

from __future__ import annotations

from collections.abc import Callable

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec, setting
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources import (
    awq_gptq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    hqq,
    mlx,
    modelopt,
    mxfp4,
)

# The finders by config.json's quant_method. Their tensors have no role, block and group yet; the family fills them in.
FINDERS: dict[str, Callable[[Checkpoint], dict[str, LogicalTensor]]] = {
    "bitsandbytes": bitsandbytes.find,
    "bitnet": bitnet.find,
    "hqq": hqq.find,
    "fp8": fp8.find,
    "compressed-tensors": compressed_tensors.find,
    "mlx": mlx.find,
    "mxfp4": mxfp4.find,
    "modelopt": modelopt.find,
    "modelopt_fp4": modelopt.find,
    "awq": awq_gptq.find_awq,
    "gptq": awq_gptq.find_gptq,
    "gguf": gguf.find,
}


def check_decodable(checkpoint: Checkpoint) -> None:
    """Raise BadSpec if no code here decodes the checkpoint's format."""
    method = checkpoint.quantized_by
    if method is not None and method not in FINDERS:
        raise BadSpec(
            f"{setting('checkpoint')}: the checkpoint is already quantized ({method}), which is not decoded here; it"
            " can be copied"
            f" ({setting('quantize')}=none), inspected and compared; decoded are: {', '.join(sorted(FINDERS))}"
        )


def quantized_tensors(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Return the quantized weights of a checkpoint by name; none if its format is not decoded here.

    Raises:
        BadCheckpoint: a quantized weight lacks one of its parts.
    """
    find = FINDERS.get(checkpoint.quantized_by or "")
    return {} if find is None else find(checkpoint)
