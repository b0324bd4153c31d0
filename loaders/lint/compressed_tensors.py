"""Checks of compressed-tensors checkpoints, as vLLM and transformers read them: targets, ignore, fused layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loaders.architectures.family import load_dtype
from loaders.checkpoints.name_patterns import fault_of
from loaders.dtypes import DTYPES
from loaders.errors import setting
from loaders.layouts.compressed_tensors import LINEAR_ROLES, fails_for_experts, is_asymmetric, name_of
from loaders.lint.base import Finding, Subject, fault, module, some, warning
from loaders.patterns import compiled
from loaders.quantization.kernels.compressed_tensors.groups import BLOCK
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedMxfp4, CompressedNvfp4
from loaders.quantization.schemes.compressed_tensors_fp8_block import Fp8Block
from loaders.strategies import small_reader
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.words import counted

FLOATS = ("F32", "F16", "BF16")
BOTH = "vLLM, transformers"


def check(subject: Subject) -> Iterator[Finding]:
    """Yield the problems that vLLM or transformers would have."""
    block: Mapping[str, Any] = subject.config["quantization_config"]
    ignore = block.get("ignore") or []
    if not (isinstance(ignore, list) and all(isinstance(name, str) for name in ignore)):
        yield fault(BOTH, "quantization_config.ignore is no list of names", "fails", "write a list")
        return
    patterns = (name.removeprefix("re:") for name in ignore if name.startswith("re:"))
    broken = next(filter(None, (fault_of(pattern, "quantization_config.ignore") for pattern in patterns)), None)
    if broken is not None:
        yield fault(BOTH, broken, "fails, or takes long, since it matches every module with it", "mend it")
        return
    tensors = [r for r in subject.sources.tensors if r.role in LINEAR_ROLES and len(r.shape) == 2]
    tensors = [r for r in tensors if r.decode is not None or r.name.endswith(".weight")]
    yield from _targets(block)
    yield from _ignored(tensors, ignore)
    yield from _fused(subject, tensors)
    dtype = _model_dtype(subject)
    yield from of_schemes([(r.decode, dtype, r.role) for r in tensors if r.decode is not None])


def _targets(block: Mapping[str, Any]) -> Iterator[Finding]:
    groups = block.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    targets = {target for group in found if isinstance(group, Mapping) for target in group.get("targets") or ()}
    if "Linear" in targets and len(targets) > 1:
        yield warning(
            "vLLM",
            'a group has the target "Linear", beside others with targets of their own',
            'takes every fused layer (qkv, gate_up) for "Linear", whatever the others say',
            "name all layers in the targets",
        )


def is_named(name: str, patterns: list[str]) -> bool:
    """Whether a module is in a list of exact names and, after "re:", regular expressions matched from the start."""
    return any(
        compiled(each.removeprefix("re:"), "quantization_config.ignore").match(name)
        if each.startswith("re:")
        else each == name
        for each in patterns
    )


def _ignored(tensors: list[LogicalTensor], ignore: list[str]) -> Iterator[Finding]:
    bare = [module(r) for r in tensors if _is_plain(r) and not is_named(module(r), ignore)]
    if bare:
        yield fault(
            BOTH,
            f"{counted(len(bare), 'linear layer is', 'linear layers are')} stored plain and not in ignore:"
            f" {some(bare)}",
            "looks for their scales and fails (a router or an MTP layer: KeyError)",
            "name them in quantization_config.ignore",
        )
    caught = [module(r) for r in tensors if r.decode is not None and is_named(module(r), ignore)]
    if caught:
        yield fault(
            BOTH,
            f"{counted(len(caught), 'quantized layer is', 'quantized layers are')} in ignore: {some(caught)}",
            "takes their codes for plain weights, and fails or computes something else",
            "take them out of quantization_config.ignore",
        )


def _is_plain(tensor: LogicalTensor) -> bool:
    return tensor.decode is None and tensor.dtype.is_float and tensor.role != "other"


def _fused(subject: Subject, tensors: list[LogicalTensor]) -> Iterator[Finding]:
    groups: dict[str, list[LogicalTensor]] = {}
    for tensor in tensors:
        if tensor.group is not None:
            groups.setdefault(tensor.group, []).append(tensor)
    unlike = [name for name, group in groups.items() if len({r.decode for r in group}) > 1]
    if unlike:
        yield fault(
            "vLLM",
            f"{counted(len(unlike), 'fused group has', 'fused groups have')} parts of different schemes:"
            f" {some(unlike)}",
            "fuses them and refuses; transformers loads them apart",
            "give all parts of a group one scheme, or keep them all",
            loads_in="transformers",
        )
    ragged = [
        name
        for name, group in groups.items()
        if any(isinstance(r.decode, Fp8Block) and r.shape[0] % BLOCK for r in group)
    ]
    if ragged:
        yield warning(
            "vLLM",
            f"{counted(len(ragged), 'fused group has', 'fused groups have')} rows that are no multiple of {BLOCK}:"
            f" {some(ragged)}",
            "refuses blocks that cross the parts of a fused layer",
            "keep them by a rule",
        )
    apart = [name for name, group in groups.items() if len({_global_scale(subject, r) for r in group}) > 1]
    if apart:
        yield warning(
            "vLLM",
            f"{counted(len(apart), 'fused group has', 'fused groups have')} parts of different global scales:"
            f" {some(apart)}",
            "takes the greatest for all and loses accuracy",
            f"share the global scale over each group, as {setting('quantize')}=nvfp4a16 does",
        )


def _global_scale(subject: Subject, tensor: LogicalTensor) -> bytes | None:
    """Read the four bytes of an NVFP4 weight's global scale; None for another scheme."""
    if not isinstance(tensor.decode, CompressedNvfp4):
        return None
    [scale] = [spec for role, spec in tensor.stored if role == "weight_global_scale"]
    with small_reader(subject.checkpoint.source, (scale,)) as reader:
        return reader.read(scale, 0, scale.size).tobytes()


def of_schemes(found: Sequence[tuple[Any, str, str]]) -> Iterator[Finding]:
    """Yield what transformers does with tensors, each given as its scheme, the model's dtype and the tensor's role.

    Plans and checks of files both ask this, so that they say the same.
    """
    experts = {scheme for scheme, _, role in found if role == "expert"}
    for scheme in sorted(experts, key=name_of):
        if isinstance(scheme, CompressedNvfp4):
            yield fault(
                "transformers 5",
                "experts are in NVFP4",
                "forgets their global scale and silently computes wrong numbers",
                "run it in vLLM",
                loads_in="vLLM",
            )
        elif fails_for_experts(scheme):
            what = f"experts are in {name_of(scheme)}"
            yield fault("transformers 5", what, "fails (CONVERSION)", "run it in vLLM", loads_in="vLLM")
    if len(experts) > 1:
        yield fault(
            "transformers 5",
            "experts are in several schemes",
            "takes one scheme for all experts, and loads others wrong",
            "run it in vLLM",
            loads_in="vLLM",
        )
    if any(is_asymmetric(scheme) and role != "expert" for scheme, _, role in found):
        yield warning(
            "transformers 5",
            "layers have zero points (W4A16_ASYM)",
            "stops at them (size mismatch; 5.23 with compressed-tensors 0.20)",
            "load it with quantization_config=CompressedTensorsConfig(dequantize=True); vLLM loads it as it is",
        )
    fours = [dtype for scheme, dtype, _ in found if isinstance(scheme, CompressedNvfp4 | CompressedMxfp4)]
    others = sorted({DTYPES[dtype].torch for dtype in fours if dtype != "BF16"})
    if others:
        yield warning(
            "transformers",
            f"FP4 in a {others[0]} model",
            f"decompresses to bfloat16, which does not multiply with {others[0]}",
            "load it with dtype=torch.bfloat16",
        )


def _model_dtype(subject: Subject) -> str:
    """Return the dtype in which transformers loads the model: what config.json says, or that of most plain tensors."""
    said = load_dtype(subject.config)
    if said is not None:
        return said.name
    plain = Counter(r.dtype.name for r in subject.sources.tensors if r.decode is None and r.dtype.name in FLOATS)
    return plain.most_common(1)[0][0] if plain else "BF16"
