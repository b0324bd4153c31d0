"""gpt-oss' experts (quant_method mxfp4): `X_blocks` and `X_scales` for X, a stack of matrices.

Blocks lie along a matrix's inputs, so that what is stored is (experts, outputs, inputs), while gpt-oss' class holds its
stacks as (experts, inputs, outputs). The model_type decides which it is: gpt-oss' down_proj is square, so that shapes
do not tell.
"""

from __future__ import annotations

from loaders.architectures.family import text_config
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, setting
from loaders.quantization.read_only.mxfp4_nvfp4 import GptOssMxfp4
from loaders.tensors.logical_tensor import LogicalTensor, Window
from loaders.tensors.quantized_sources.base import expect, float_dtype, part

BLOCKS, SCALES = "_blocks", "_scales"
TRANSPOSED = ("gpt_oss",)  # model types whose class holds (experts, inputs, outputs)


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized stacks, by name.

    Raises:
        BadCheckpoint: blocks lack their scales, have other shapes, or are of a model whose orientation is not known.
    """
    by_name = {spec.name: spec for spec in checkpoint.weights}
    names = (n.removesuffix(s) for n in by_name for s in (BLOCKS, SCALES) if n.endswith(s))
    found = {}
    for name in dict.fromkeys(names):
        model_type = text_config(checkpoint.config, "model_type")
        if model_type not in TRANSPOSED:
            raise BadCheckpoint(
                f"{name}: whether experts of model_type {model_type!r} are stored transposed is not known (known:"
                f" {', '.join(TRANSPOSED)}), and their shapes do not tell; copy the checkpoint as it is"
                f" ({setting('quantize')}=none)"
            )
        blocks, scales = part(by_name, name, name + BLOCKS), part(by_name, name, name + SCALES)
        if blocks.dtype.name != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != 16:
            raise BadCheckpoint(
                f"{blocks.name}: expected U8 [experts, rows, groups, 16], found {blocks.dtype} {list(blocks.shape)}"
            )
        expect(scales, ("U8", "F8_E8M0"), blocks.shape[:3], f"for {blocks.name}")
        experts, rows, columns = blocks.shape[0], blocks.shape[1], blocks.shape[2] * GptOssMxfp4.group
        found[name] = LogicalTensor(
            name=name, dtype=float_dtype(checkpoint), shape=(experts, columns, rows),
            stored=(("blocks", blocks), ("scales", scales)),
            window=Window(0, (rows * columns, 1, columns)), decode=GptOssMxfp4(), whole=(experts, rows, columns),
        )  # fmt: skip
    return found
