"""AWQ's (version gemm) and GPTQ's weights: `X.qweight`, `X.qzeros`, `X.scales` and perhaps `X.g_idx` for X.weight."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DType
from loaders.errors import BadCheckpoint
from loaders.limits import check_patterns
from loaders.patterns import Allowance, compiled
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
        raise BadCheckpoint(f"AWQ version {version!r} is not decoded; {' and '.join(AWQ_VERSIONS)} are")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise BadCheckpoint(f"AWQ of {bits!r} bits is not decoded; 4 are")
    size = group_size(settings, "group_size", "q_group_size")
    by_name = {spec.name: spec for spec in checkpoint.weights}
    return {f"{m}.weight": awq_weight(by_name, m, size, float_dtype(checkpoint)) for m in packed_modules(by_name)}


def awq_weight(by_name: Mapping[str, WeightSpec], module: str, size: int, dtype: DType) -> LogicalTensor:
    """Return the weight of a module that AWQ packed in groups of `size`, -1 for whole rows.

    Raises:
        BadCheckpoint: a part is missing, or has another shape.
    """
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
    """Find the weights that GPTQ quantized, by name. With `dynamic` settings, modules differ in bits and group size.

    Raises:
        BadCheckpoint: another format or bit width, a weight that is not whole, or one that is not as the settings say.
    """
    settings = quantization_block(checkpoint)
    form = str(settings.get("checkpoint_format") or "gptq").lower()
    form = "marlin" if settings.get("is_marlin_format") else form
    if form not in ZERO_OFFSETS:
        raise BadCheckpoint(f"GPTQ's checkpoint_format {form!r} is not decoded; {' and '.join(ZERO_OFFSETS)} are")
    by_name = {spec.name: spec for spec in checkpoint.weights}
    modules, dtype = packed_modules(by_name), float_dtype(checkpoint)
    dynamic = Dynamic(settings)
    dynamic.check(modules, by_name)
    offset = ZERO_OFFSETS[form]
    return {f"{m}.weight": gptq_weight(by_name, m, dynamic.settings_of(m), offset, dtype) for m in modules}


class Dynamic:
    """GPTQModel's `dynamic` settings: regular expressions, of which the first that matches a module's name counts.

    One that begins with "-:" leaves modules plain; any other, with "+:" or without, gives them settings of their own.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        entries = settings.get("dynamic") or {}
        if not isinstance(entries, Mapping):
            raise BadCheckpoint(f"GPTQ's dynamic settings: expected patterns with settings, found {entries!r:.80}")
        check_patterns(len(entries), "GPTQ's dynamic settings")
        allowance = Allowance()
        self._entries = [
            (
                key,
                compiled(re.sub(r"^[-+]:", "", key), "GPTQ's dynamic settings", allowance),
                own if isinstance(own, Mapping) else {},
            )
            for key, own in entries.items()
        ]

    def settings_of(self, module: str) -> Mapping[str, Any]:
        """Return the settings of a quantized module."""
        own = next((own for _, pattern, own in self._entries if pattern.match(module)), {})
        return {**self._settings, **own}

    def check(self, quantized: Collection[str], by_name: Mapping[str, WeightSpec]) -> None:
        """Check that each pattern names modules, and that these are stored as it says.

        Raises:
            BadCheckpoint: they are not.
        """
        plain = [n.removesuffix(".weight") for n, s in by_name.items() if n.endswith(".weight") and len(s.shape) == 2]
        for key, pattern, _ in self._entries:
            packed = [module for module in quantized if pattern.match(module)]
            if not packed and not any(map(pattern.match, plain)):
                raise BadCheckpoint(
                    f"GPTQ's dynamic settings: {key!r} names no module of this checkpoint, so that it was made for"
                    " another"
                    " one; correct or remove it"
                )
            if not packed and not key.startswith("-:"):
                raise BadCheckpoint(
                    f"GPTQ's dynamic settings: {key!r} says how modules are quantized that are all stored plain;"
                    " correct"
                    " or remove it"
                )
        for module in quantized:
            key = next((key for key, pattern, _ in self._entries if pattern.match(module)), "")
            if key.startswith("-:"):
                raise BadCheckpoint(
                    f"{module}: GPTQ's dynamic settings ({key!r}) say that it is plain, but it is stored quantized;"
                    " correct the pattern"
                )


def gptq_weight(
    by_name: Mapping[str, WeightSpec], module: str, settings: Mapping[str, Any], offset: int, dtype: DType,
    *, wraps: bool = True,
) -> LogicalTensor:  # fmt: skip
    """Return the weight of a module that GPTQ packed; `offset` and `wraps` say what stored zeros are (`Gptq`).

    Raises:
        BadCheckpoint: a part is missing, or it has another shape than the module's settings give.
    """
    name = f"{module}.weight"
    parts = {role: part(by_name, name, f"{module}.{role}") for role in ("qweight", "qzeros", "scales")}
    index = by_name.get(f"{module}.g_idx")
    words, outputs = _matrix(parts["qweight"])
    # The zeros of a group are as many codes as there are outputs, so that their words tell how many bits a code has.
    bits = _matrix(parts["qzeros"])[1] * 32 // max(1, outputs)
    if not 2 <= bits <= 8:
        raise BadCheckpoint(f"{name}: GPTQ of {bits} bits is not decoded; 2 to 8 are")
    if outputs * bits % 32 or words * 32 % bits:
        raise BadCheckpoint(
            f"{name}: {parts['qweight'].name} {[words, outputs]} and {parts['qzeros'].name}"
            f" {list(parts['qzeros'].shape)} hold no whole number of codes of {bits} bits; fetch the checkpoint again"
        )
    declared = settings.get("bits", bits)
    if declared != bits:
        raise BadCheckpoint(
            f"{name}: the settings say {declared!r} bits, but its shapes are those of {bits} ({parts['qzeros'].name}"
            f" {list(parts['qzeros'].shape)} for {outputs} outputs); correct the settings, or give this module its own"
            " (under dynamic for GPTQ, extra_config for AutoRound)"
        )
    inputs, size = words * 32 // bits, group_size(settings, "group_size")
    size = inputs if size == -1 else size
    why = f"for {outputs} outputs and {inputs} inputs of {bits} bits in groups of {size}, as the settings say"
    expect(parts["qzeros"], ("I32",), (-(-inputs // size), outputs * bits // 32), why)
    expect(parts["scales"], SCALES, (-(-inputs // size), outputs), why)
    if index is not None:
        parts["g_idx"] = expect(index, ("I32",), (inputs,), why)
    decoder = Gptq(
        bits=bits, group_size=size, zero_offset=offset, has_index=index is not None,
        scale_dtype=parts["scales"].dtype.name, wraps=wraps,
    )  # fmt: skip
    return undecoded(TensorSpec(name, dtype, (outputs, inputs)), decoder, parts, by_name)


def packed_modules(by_name: Mapping[str, WeightSpec]) -> list[str]:
    """Return the modules of which there is a packed part."""
    names = (name.removesuffix(end) for name in by_name for end in PARTS if name.endswith(end))
    return list(dict.fromkeys(names))


def _matrix(packed: WeightSpec) -> tuple[int, int]:
    if packed.dtype.name != "I32" or len(packed.shape) != 2:
        raise BadCheckpoint(f"{packed.name}: expected I32 [rows, columns], found {packed.dtype} {list(packed.shape)}")
    return packed.shape[0], packed.shape[1]


def group_size(settings: Mapping[str, Any], *keys: str) -> int:
    """Return the group size under the first key that is there; 128, the tools' default, if none is.

    Raises:
        BadCheckpoint: it is no group size.
    """
    size = next((settings[key] for key in keys if key in settings), 128)
    if type(size) is not int or (size < 1 and size != -1):
        raise BadCheckpoint(f"expected a group_size of 1 or more, or -1 for whole rows, found {size!r}")
    return size
