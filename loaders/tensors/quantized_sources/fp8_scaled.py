"""float8 weights with a scale for the whole matrix or for each row: fbgemm's, ModelOpt's, AutoRound's, vLLM's `fp8`."""

from __future__ import annotations

from collections.abc import Mapping

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DType
from loaders.errors import BadCheckpoint
from loaders.quantization.read_only.deepseek_fp8 import Fp8Blocks
from loaders.specs import TensorSpec, WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.base import expect, float_dtype, part, undecoded

SCALE_DTYPES = ("F32", "BF16", "F16")


def find_fbgemm(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the weights that fbgemm quantized (Llama 3.1 405B FP8), by name: a scale for each row.

    Raises:
        BadCheckpoint: a weight lacks its scale, or has another shape.
    """
    by_name = {spec.name: spec for spec in checkpoint.weights}
    coded = [spec.name for spec in checkpoint.weights if spec.dtype.name == "F8_E4M3"]
    scaled = (name.removesuffix("_scale") for name in by_name if name.endswith(".weight_scale"))
    dtype = float_dtype(checkpoint)
    return {
        name: scaled_weight(by_name, part(by_name, name, name), part(by_name, name, f"{name}_scale"), dtype)
        for name in dict.fromkeys([*coded, *scaled])
    }


def scaled_weight(
    by_name: Mapping[str, WeightSpec], weight: WeightSpec, scale: WeightSpec, dtype: DType
) -> LogicalTensor:
    """Return the weight of a matrix of E4M3 codes with one scale, of whatever shape, or with one for each row.

    Raises:
        BadCheckpoint: it is no such matrix, or the scale has another dtype or shape.
    """
    name = weight.name
    if weight.dtype.name != "F8_E4M3" or len(weight.shape) != 2:
        raise BadCheckpoint(
            f"{name}: it has a {scale.name}; expected an F8_E4M3 matrix, found {weight.dtype} {list(weight.shape)}"
        )
    rows, columns = weight.shape
    is_single = scale.numel() == 1
    wanted = scale.shape if is_single or scale.shape == (rows,) else (rows, 1)
    expect(scale, SCALE_DTYPES, wanted, f"for {name} {[rows, columns]}, whose scale is one, or one for each row")
    decoder = Fp8Blocks(None if is_single else (1, max(1, columns)), scale.dtype.name)
    parts = {"weight": weight, "weight_scale_inv": scale}
    return undecoded(TensorSpec(name, dtype, weight.shape), decoder, parts, by_name)
