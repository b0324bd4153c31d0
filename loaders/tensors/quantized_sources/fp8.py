"""float8 weights (quant_method fp8, mxfp8) with scales by block, as DeepSeek V3 has them, or for rows or the whole.

A weight and its scale are paired by name over all shards. Besides `X.weight` with `X.weight_scale_inv` there are
transformers' 3-D experts, `X` with `X_scale_inv`, and DeepSeek V4's spelling, `X.scale`. vLLM's form has
`X.weight_scale`, one or one for each row, and `X.input_scale` for a static activation_scheme. DeepSeek V4's experts are
MXFP4: int8 bytes of two codes each, with a `X.scale` of powers of two for every 32 columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DType
from loaders.errors import BadCheckpoint
from loaders.quantization.read_only.deepseek_fp8 import SCALE_DTYPES, Fp8Blocks
from loaders.quantization.read_only.mxfp4_nvfp4 import DeepSeekFp4
from loaders.specs import TensorSpec, WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.base import expect, float_dtype, part, quantization_block, undecoded
from loaders.tensors.quantized_sources.fp8_scaled import scaled_weight

SUFFIX = "_scale_inv"
ROWS = ".weight_scale"


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized weights, by name.

    Raises:
        BadCheckpoint: a float8 weight lacks its scale, or that has another shape than the blocks give.
    """
    by_name = {spec.name: spec for spec in checkpoint.weights}
    block = _block_size(quantization_block(checkpoint), [1, 32] if checkpoint.quantized_by == "mxfp8" else [128, 128])
    dtype = float_dtype(checkpoint)
    coded = [spec.name for spec in checkpoint.weights if spec.dtype.name == "F8_E4M3"]
    scaled = [name.removesuffix(SUFFIX) for name in by_name if name.endswith(SUFFIX)]
    scaled += [name.removesuffix("_scale") for name in by_name if name.endswith(ROWS)]
    found = {name: _tensor(by_name, name, block, dtype) for name in dict.fromkeys([*coded, *scaled])}
    packed = (spec for spec in checkpoint.weights if spec.dtype.name == "I8" and spec.name.endswith(".weight"))
    return found | {spec.name: _fp4(by_name, spec, dtype) for spec in packed if spec.name not in found}


@cache
def _decoder(block: tuple[int, int] | None, scale_dtype: str) -> Fp8Blocks:
    """Return one decoder for all weights whose scales have the same form."""
    return Fp8Blocks(block, scale_dtype)


def _block_size(settings: Mapping[str, Any], usual: list[int]) -> tuple[int, int] | None:
    block = settings.get("weight_block_size", usual)
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise BadCheckpoint(f"config.json: expected a weight_block_size of two positive numbers, found {block!r}")
    return block[0], block[1]


def _tensor(by_name: Mapping[str, WeightSpec], name: str, block: tuple[int, int] | None, dtype: DType) -> LogicalTensor:
    weight = part(by_name, name + SUFFIX, name)
    own = (name + SUFFIX, name + "_scale", name.removesuffix("weight") + "scale")
    scale = part(by_name, name, next((each for each in own if each in by_name), name + SUFFIX))
    if weight.dtype.name != "F8_E4M3" or len(weight.shape) < 2:
        raise BadCheckpoint(
            f"{name}: it has a {scale.name}; expected an F8_E4M3 matrix, found {weight.dtype} {list(weight.shape)}"
        )
    decoder = _decoder(block, scale.dtype.name)
    wanted = decoder.scale_shape(weight.shape)
    if scale.name == name + "_scale" and (block is None or scale.shape != wanted):
        return scaled_weight(by_name, weight, scale, dtype)
    if block is None and scale.numel() == 1 and len(weight.shape) == 2:
        wanted = scale.shape  # tools write a single scale as [], [1] or [1, 1]
    blocks = "the whole matrix" if block is None else f"blocks of {block[0]}x{block[1]}"
    expect(scale, SCALE_DTYPES, wanted, f"for {name} {list(weight.shape)} in {blocks}")
    parts = {"weight": weight, "weight_scale_inv": scale}
    return undecoded(TensorSpec(name, dtype, weight.shape), decoder, parts, by_name)


def _fp4(by_name: Mapping[str, WeightSpec], weight: WeightSpec, dtype: DType) -> LogicalTensor:
    name, group = weight.name, DeepSeekFp4.group
    scale = part(by_name, name, name.removesuffix("weight") + "scale")
    if len(weight.shape) != 2 or weight.shape[1] * 2 % group:
        raise BadCheckpoint(
            f"{name}: expected float4 codes I8 [R, C/2], whose C divides into groups of {group}, found"
            f" {list(weight.shape)}"
        )
    rows, columns = weight.shape[0], weight.shape[1] * 2
    expect(scale, ("F8_E8M0", "U8"), (rows, columns // group), f"for float4 {name} {[rows, columns]}")
    return undecoded(
        TensorSpec(name, dtype, (rows, columns)), DeepSeekFp4(), {"weight": weight, "scale": scale}, by_name
    )
