"""NVIDIA ModelOpt's weights: NVFP4, MXFP4, FP8 and MXFP8, as config.json or hf_quant_config.json says.

    quant_algo                                         stored
    NVFP4, W4A16_NVFP4, W4A8_NVFP4_FP8, NVFP4_AWQ      X.weight, X.weight_scale (float8), X.weight_scale_2
    MXFP4, W4A8_MXFP4_FP8                              X.weight, X.weight_scale (powers of two)
    FP8, FP8_PER_CHANNEL_PER_TOKEN                     X.weight, X.weight_scale: one, or one for each row
    FP8_PB_WO, FP8_PB_REAL                             X.weight, X.weight_scale (R/128, 1, C/128, 1) or (R/128, C/128)
    MXFP8                                              X.weight, X.weight_scale (R, C/32), powers of two
    MIXED_PRECISION                                    each module as quantized_layers says

X.input_scale and scales of the cache are for the engine at run time. This was checked against ModelOpt 0.47
(modelopt/torch/export/quant_utils.py and quantization/qtensor), not against the header of a published checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DType
from loaders.errors import BadCheckpoint
from loaders.quantization.read_only.deepseek_fp8 import Fp8Blocks
from loaders.quantization.read_only.mxfp4_nvfp4 import DeepSeekFp4, ModelOptNvfp4
from loaders.specs import TensorSpec, WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.base import expect, float_dtype, part, quantization_block, undecoded
from loaders.tensors.quantized_sources.fp8_scaled import scaled_weight

MIXED = "MIXED_PRECISION"
STORED = {  # what each algorithm stores
    "NVFP4": "NVFP4", "W4A16_NVFP4": "NVFP4", "W4A8_NVFP4_FP8": "NVFP4", "NVFP4_AWQ": "NVFP4", "MXFP4": "MXFP4",
    "W4A8_MXFP4_FP8": "MXFP4", "FP8": "FP8", "FP8_PER_CHANNEL_PER_TOKEN": "FP8", "FP8_PC_PT": "FP8",
    "FP8_PB_WO": "FP8", "FP8_PB_REAL": "FP8", "MXFP8": "MXFP8",
}  # fmt: skip
GROUPS = {"NVFP4": ModelOptNvfp4.group, "MXFP4": DeepSeekFp4.group, "MXFP8": 32}
PB_BLOCK = 128
ENDS = (".weight_scale", ".weight_scale_2")


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized weights, by name.

    Raises:
        BadCheckpoint: another algorithm, or a weight that is not whole.
    """
    settings = quantization_block(checkpoint)
    listed = _listed(settings)
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
    _check_algorithms(_algorithm(settings), listed, found)
    return found


def _algorithm(settings: Mapping[str, Any]) -> str:
    return str(settings.get("quant_algo")).upper()


def _listed(settings: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the algorithms of modules that have one of their own.

    Raises:
        BadCheckpoint: an algorithm, or its group size, is not decoded.
    """
    layers = settings.get("quantized_layers")
    own = {m: each for m, each in layers.items() if isinstance(each, Mapping)} if isinstance(layers, Mapping) else {}
    for place, each in (("", settings), *((f"{module}: ", each) for module, each in own.items())):
        said, size = _algorithm(each), each.get("group_size")
        known = said in STORED or (said == MIXED and not place)
        if not known or (size is not None and size != GROUPS.get(STORED.get(said, ""), size)):
            groups = ", ".join(f"{name} in groups of {count}" for name, count in GROUPS.items())
            raise BadCheckpoint(
                f"{place}ModelOpt's quant_algo {each.get('quant_algo')!r} in groups of {size} is not decoded;"
                f" {groups}, and FP8, are: {', '.join(STORED)}"
            )
    return {module: _algorithm(each) for module, each in own.items()}


def _check_algorithms(usual: str, listed: Mapping[str, str], found: Mapping[str, LogicalTensor]) -> None:
    """Check that weights are stored as the settings say.

    Raises:
        BadCheckpoint: a weight is stored in another way than its algorithm's, or one that is listed is plain.
    """
    modules = {name.removesuffix(".weight") for name in found}
    parents = {module[:at] for module in modules for at, letter in enumerate(module) if letter == "."}
    for module in listed:
        if module not in modules and module not in parents:
            raise BadCheckpoint(
                f"quantized_layers names {module}, of which no quantized weight is stored; correct the list, or fetch"
                " the checkpoint again"
            )
    for name, tensor in found.items():
        said = STORED.get(listed.get(name.removesuffix(".weight"), usual))
        stored = _stored_as(tensor)
        if said is not None and said != stored:
            raise BadCheckpoint(f"{name}: its quant_algo is {said}, but what is stored is {stored}; correct quant_algo")


def _stored_as(tensor: LogicalTensor) -> str:
    if isinstance(tensor.decode, ModelOptNvfp4):
        return "NVFP4"
    if isinstance(tensor.decode, DeepSeekFp4):
        return "MXFP4"
    assert isinstance(tensor.decode, Fp8Blocks)
    return "MXFP8" if tensor.decode.scale_dtype == "U8" else "FP8"


def _tensor(by_name: Mapping[str, WeightSpec], name: str, dtype: DType) -> LogicalTensor:
    weight, scale = part(by_name, name, name), part(by_name, name, name + "_scale")
    if len(weight.shape) < 2 or weight.dtype.name not in ("U8", "F8_E4M3"):
        raise BadCheckpoint(f"{name}: expected U8 or F8_E4M3 [R, C], found {weight.dtype} {list(weight.shape)}")
    if weight.dtype.name == "F8_E4M3":
        return _fp8(by_name, weight, scale, dtype)
    shape, is_mx = (*weight.shape[:-1], weight.shape[-1] * 2), scale.dtype.name == "U8"
    decoder = DeepSeekFp4() if is_mx else ModelOptNvfp4()
    parts = {"weight": weight, "scale" if is_mx else "weight_scale": scale}
    if not is_mx:
        top = part(by_name, name, name + "_scale_2")
        parts["weight_scale_2"] = expect(top, ("F32",), top.shape if top.numel() == 1 else (), f"for {name}")
    wanted = (*shape[:-1], shape[-1] // decoder.group)
    expect(scale, ("U8",) if is_mx else ("F8_E4M3",), wanted, f"for {name} {list(shape)}")
    if shape[-1] % decoder.group:
        raise BadCheckpoint(f"{name}: its rows of {shape[-1]} do not divide into groups of {decoder.group}")
    return undecoded(TensorSpec(name, dtype, shape), decoder, parts, by_name)


def _fp8(by_name: Mapping[str, WeightSpec], weight: WeightSpec, scale: WeightSpec, dtype: DType) -> LogicalTensor:
    if scale.dtype.name == "U8":
        decoder = Fp8Blocks((1, GROUPS["MXFP8"]), "U8")
    elif len(weight.shape) == 2 and _is_by_blocks(weight, scale):
        decoder = Fp8Blocks((PB_BLOCK, PB_BLOCK), scale.dtype.name)
    else:
        return scaled_weight(by_name, weight, scale, dtype)
    if scale.dtype.name == "U8":
        expect(scale, ("U8",), decoder.scale_shape(weight.shape), f"for {weight.name} {list(weight.shape)}")
    parts = {"weight": weight, "weight_scale_inv": scale}
    return undecoded(TensorSpec(weight.name, dtype, weight.shape), decoder, parts, by_name)


def _is_by_blocks(weight: WeightSpec, scale: WeightSpec) -> bool:
    """Whether there is a scale for each block, in two dimensions or, with a one after each, in four."""
    down, across = Fp8Blocks((PB_BLOCK, PB_BLOCK), "F32").scale_shape(weight.shape)
    is_float = scale.dtype.name in ("F32", "BF16", "F16")
    return is_float and scale.numel() > 1 and scale.shape in ((down, across), (down, 1, across, 1))
