"""AWQ's (version gemm) and GPTQ's weights: `X.qweight`, `X.qzeros`, `X.scales` and perhaps `X.g_idx` for X.weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DType
from loaders.errors import BadCheckpoint
from loaders.quantization.read_only.awq_gptq import Awq, Gptq
from loaders.specs import TensorSpec, WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.base import expect, float_dtype, part, quantization_block, undecoded

PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
SCALES = ("F16", "BF16", "F32")
AWQ_VERSIONS = ("gemm", "ipex")  # the versions that share one way of storing
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # by checkpoint_format: what stored zeros lack


def find_awq(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the weights that AWQ quantized, by name.

    Raises:
        BadCheckpoint: another version or bit width, or a weight that is not whole.
    """
    settings = quantization_block(checkpoint)
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version not in AWQ_VERSIONS:
        raise BadCheckpoint(f"config.json: AWQ version {version!r} is not decoded; {' and '.join(AWQ_VERSIONS)} are")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise BadCheckpoint(f"config.json: AWQ of {bits!r} bits is not decoded; 4 are")
    size = _group_size(settings, "group_size", "q_group_size")
    by_name = {spec.name: spec for spec in checkpoint.weights}
    return {f"{m}.weight": _awq(by_name, m, size, float_dtype(checkpoint)) for m in _modules(by_name)}


def _awq(by_name: Mapping[str, WeightSpec], module: str, size: int, dtype: DType) -> LogicalTensor:
    name = f"{module}.weight"
    parts = {role: part(by_name, name, f"{module}.{role}") for role in ("qweight", "qzeros", "scales")}
    inputs, width = _matrix(parts["qweight"])
    size = inputs if size == -1 else size
    groups, outputs = -(-inputs // size), width * 8
    expect(parts["qzeros"], ("I32",), (groups, width), f"for {inputs} inputs in groups of {size}")
    expect(parts["scales"], SCALES, (groups, outputs), f"for {inputs} inputs in groups of {size}")
    decoder = Awq(size, parts["scales"].dtype.name)
    return undecoded(TensorSpec(name, dtype, (outputs, inputs)), decoder, parts, by_name)


def find_gptq(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the weights that GPTQ quantized, by name. With `dynamic` settings, a weight's bits follow from its shapes.

    Raises:
        BadCheckpoint: another format or bit width, or a weight that is not whole.
    """
    settings = quantization_block(checkpoint)
    form = str(settings.get("checkpoint_format") or "gptq").lower()
    form = "marlin" if settings.get("is_marlin_format") else form
    if form not in ZERO_OFFSETS:
        raise BadCheckpoint(
            f"config.json: GPTQ checkpoint_format {form!r} is not decoded; {' and '.join(ZERO_OFFSETS)} are"
        )
    by_name = {spec.name: spec for spec in checkpoint.weights}
    dtype = float_dtype(checkpoint)
    return {f"{m}.weight": _gptq(by_name, m, settings, ZERO_OFFSETS[form], dtype) for m in _modules(by_name)}


def _gptq(
    by_name: Mapping[str, WeightSpec], module: str, settings: Mapping[str, Any], offset: int, dtype: DType
) -> LogicalTensor:
    name = f"{module}.weight"
    parts = {role: part(by_name, name, f"{module}.{role}") for role in ("qweight", "qzeros", "scales")}
    index = by_name.get(f"{module}.g_idx")
    words, outputs = _matrix(parts["qweight"])
    # With `dynamic` settings (GPTQModel), bits and group size differ by module, so they follow from the shapes. The
    # length of g_idx is then the only place that tells the number of inputs.
    if index is not None and not settings.get("dynamic"):
        expect(index, ("I32",), (words * 32 // int(settings.get("bits") or 4),), f"for {name}")
    inputs = index.numel() if index is not None else words * 32 // int(settings.get("bits") or 4)
    bits = words * 32 // max(1, inputs)
    if bits not in (2, 4, 8) or words * 32 != bits * inputs:
        raise BadCheckpoint(
            f"{name}: GPTQ of {bits} bits ({inputs} inputs in {words} words) is not decoded; 2, 4, 8 are"
        )
    size = _group_size(settings, "group_size")
    groups = parts["scales"].shape[0] if parts["scales"].shape else 0
    size = inputs if size == -1 else size
    if settings.get("dynamic") and groups:
        size = -(-inputs // groups)
    groups = -(-inputs // size)
    why = f"for {outputs} outputs and {inputs} inputs in groups of {size}"
    expect(parts["qzeros"], ("I32",), (groups, outputs * bits // 32), why)
    expect(parts["scales"], SCALES, (groups, outputs), why)
    if index is not None:
        parts["g_idx"] = expect(index, ("I32",), (inputs,), why)
    decoder = Gptq(bits, size, offset, index is not None, parts["scales"].dtype.name)
    return undecoded(TensorSpec(name, dtype, (outputs, inputs)), decoder, parts, by_name)


def _modules(by_name: Mapping[str, WeightSpec]) -> list[str]:
    """Return the modules of which there is a packed part."""
    names = (name.removesuffix(end) for name in by_name for end in PARTS if name.endswith(end))
    return list(dict.fromkeys(names))


def _matrix(packed: WeightSpec) -> tuple[int, int]:
    if packed.dtype.name != "I32" or len(packed.shape) != 2:
        raise BadCheckpoint(f"{packed.name}: expected I32 [rows, columns], found {packed.dtype} {list(packed.shape)}")
    return packed.shape[0], packed.shape[1]


def _group_size(settings: Mapping[str, Any], *keys: str) -> int:
    """Return the group size under the first key that is there; 128, both tools' default, if none is."""
    size = next((settings[key] for key in keys if key in settings), 128)
    if type(size) is not int or (size < 1 and size != -1):
        raise BadCheckpoint(f"config.json: expected a group_size of 1 or more, or -1 for whole rows, found {size!r}")
    return size
