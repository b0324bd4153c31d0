"""NVIDIA ModelOpt's weights: NVFP4, and FP8 with one scale a matrix, as config.json or hf_quant_config.json says.

They are `X.weight` with `X.weight_scale`, and for NVFP4 `X.weight_scale_2`; `X.input_scale` and scales of the cache are
for the engine at run time. This was checked against ModelOpt's code, not against the header of a published checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DType
from loaders.errors import BadCheckpoint
from loaders.quantization.read_only.deepseek_fp8 import Fp8Blocks
from loaders.quantization.read_only.mxfp4_nvfp4 import ModelOptNvfp4
from loaders.specs import TensorSpec, WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.base import expect, float_dtype, part, quantization_block, undecoded

ALGORITHMS = ("NVFP4", "FP8", "MIXED_PRECISION")  # with mixed precision, each tensor's dtype shows which it has
ENDS = (".weight_scale", ".weight_scale_2")


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized weights, by name.

    Raises:
        BadCheckpoint: another algorithm, or a weight that is not whole.
    """
    settings = quantization_block(checkpoint)
    if settings.get("quant_algo") not in ALGORITHMS or settings.get("group_size") not in (None, ModelOptNvfp4.group):
        raise BadCheckpoint(
            f"ModelOpt's quant_algo {settings.get('quant_algo')!r} in groups of {settings.get('group_size')} is not"
            f" decoded; NVFP4 in groups of {ModelOptNvfp4.group}, and FP8, are"
        )
    by_name = {spec.name: spec for spec in checkpoint.weights}
    foreign = [n for n in by_name if n.endswith(("pre_quant_scale", "_weight_scale", "_weight_scale_2"))]
    if foreign:
        raise BadCheckpoint(
            f"{foreign[0]}: weights smoothed for their activations, and stacks of experts, are not decoded from"
            " ModelOpt's checkpoints"
        )
    scaled = [name.removesuffix(end) + ".weight" for name in by_name for end in ENDS if name.endswith(end)]
    coded = [s.name for s in checkpoint.weights if s.dtype.name in ("U8", "F8_E4M3") and s.name.endswith(".weight")]
    found = {name: _tensor(by_name, name, float_dtype(checkpoint)) for name in dict.fromkeys([*scaled, *coded])}
    _check_algorithms(settings, found)
    return found


def _check_algorithms(settings: Mapping[str, Any], found: Mapping[str, LogicalTensor]) -> None:
    """Check that weights are stored as the settings say.

    Raises:
        BadCheckpoint: a weight is FP8 that is said to be NVFP4, or the other way round, or one that is listed is plain.
    """
    usual, layers = settings["quant_algo"], settings.get("quantized_layers")
    listed = layers if isinstance(layers, Mapping) else {}
    for module in listed:
        if f"{module}.weight" not in found:
            raise BadCheckpoint(
                f"quantized_layers names {module}, of which no quantized weight is stored; correct the list, or fetch"
                " the checkpoint again"
            )
    for name, tensor in found.items():
        own = listed.get(name.removesuffix(".weight"))
        said = own.get("quant_algo", usual) if isinstance(own, Mapping) else usual
        stored = "NVFP4" if isinstance(tensor.decode, ModelOptNvfp4) else "FP8"
        if said in ("NVFP4", "FP8") and said != stored:
            raise BadCheckpoint(f"{name}: its quant_algo is {said}, but what is stored is {stored}; correct quant_algo")


def _tensor(by_name: Mapping[str, WeightSpec], name: str, dtype: DType) -> LogicalTensor:
    weight, scale = part(by_name, name, name), part(by_name, name, name + "_scale")
    if len(weight.shape) < 2 or weight.dtype.name not in ("U8", "F8_E4M3"):
        raise BadCheckpoint(f"{name}: expected U8 or F8_E4M3 [R, C], found {weight.dtype} {list(weight.shape)}")
    if weight.dtype.name == "F8_E4M3":
        wanted = scale.shape if scale.numel() == 1 and len(weight.shape) == 2 else (1,)
        expect(scale, ("F32", "BF16", "F16"), wanted, f"for {name} {list(weight.shape)}")
        parts = {"weight": weight, "weight_scale_inv": scale}
        return undecoded(TensorSpec(name, dtype, weight.shape), Fp8Blocks(None, scale.dtype.name), parts, by_name)
    top = part(by_name, name, name + "_scale_2")
    shape = (*weight.shape[:-1], weight.shape[-1] * 2)
    expect(scale, ("F8_E4M3",), (*shape[:-1], shape[-1] // ModelOptNvfp4.group), f"for {name} {list(shape)}")
    expect(top, ("F32",), top.shape if top.numel() == 1 else (), f"for {name}")
    if shape[-1] % ModelOptNvfp4.group:
        raise BadCheckpoint(f"{name}: its rows of {shape[-1]} do not divide into groups of {ModelOptNvfp4.group}")
    parts = {"weight": weight, "weight_scale": scale, "weight_scale_2": top}
    return undecoded(TensorSpec(name, dtype, shape), ModelOptNvfp4(), parts, by_name)
