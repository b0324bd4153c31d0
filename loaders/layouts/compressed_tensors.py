"""compressed-tensors' block in config.json, which says which modules have which scheme, and which have none.

The keys are those that llm-compressor 0.14 writes (QuantizationConfig of compressed-tensors). Three readers match
module names against `targets` and `ignore`, each in its own way:
- compressed-tensors in transformers matches an exact name, then a regular expression ("re:", from the start), then a
  class;
- vLLM matches the fused module's own name, then its class, and only then the names of its parts. Beside a target
  "Linear" no other target would reach a fused layer, so that with several schemes all targets are names;
- transformers 5, for experts, which it fuses, takes the first group with a regular expression that contains "experts".
`ignore` holds every linear module that stays as it is, by its exact name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loaders.architectures.family import Family
from loaders.architectures.renames import WRAPPERS
from loaders.errors import setting
from loaders.layouts.base import module_of
from loaders.layouts.inside_names import inside_patterns, may_be_linear, modules_within, tied_patterns
from loaders.quantization.kernels.compressed_tensors.groups import BLOCK
from loaders.quantization.scheme import Decoder, Scheme
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedMxfp4, CompressedNvfp4
from loaders.quantization.schemes.compressed_tensors_fp8_block import Fp8Block
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.quantization.schemes.compressed_tensors_rowwise import RowScaled
from loaders.rules.defaults import LINEAR, OTHER_LINEAR
from loaders.rules.rule import Decision
from loaders.words import counted

ENGINE = "compressed-tensors"
VERSION = "0.20.0"  # the version of compressed-tensors whose bytes are written
LINEAR_ROLES = (*LINEAR, *OTHER_LINEAR, "conv1d", "expert", "head", "router", "other")
EXPERTS = re.compile(r"(.*\bexperts)\.\d+\.")
STACK = re.compile(r"(.*\bexperts)\.")


def config_block(decisions: Sequence[Decision], config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the whole block."""
    members: dict[Scheme, list[Decision]] = {}
    for decision in quantized(decisions):
        assert decision.scheme is not None
        members.setdefault(decision.scheme, []).append(decision)
    formats = {format_of(scheme) for scheme in members}
    everything = [module_of(d.tensor.name) for d in decisions if is_linear(d)]
    groups = {
        f"group_{index}": {
            "format": format_of(scheme),
            "input_activations": activations_of(scheme),
            "output_activations": None,
            "targets": ["Linear"] if len(members) == 1 else targets_of(found, everything),
            "weights": weights_of(scheme),
        }
        for index, (scheme, found) in enumerate(members.items())
    }
    return {
        "config_groups": groups,
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": ignored(decisions, config, family),
        "kv_cache_scheme": None,
        "quant_method": ENGINE,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def quantized(decisions: Sequence[Decision]) -> list[Decision]:
    return [d for d in decisions if d.action == "quantize"]


def is_linear(decision: Decision) -> bool:
    """Whether an engine may take the tensor's module for a linear layer."""
    tensor = decision.tensor
    return tensor.role in LINEAR_ROLES and len(tensor.shape) == 2 and tensor.name.endswith(".weight")


def ignored(decisions: Sequence[Decision], config: Mapping[str, Any], family: Family) -> list[str]:
    """Return every linear module that is not quantized, including a head that is tied and not stored.

    Experts that stay a stack are named by a pattern, since engines ask for each expert by name.
    """
    plain = [d for d in decisions if d.action in ("keep", "cast")]
    kept = [d for d in plain if is_linear(d) or (family.is_generic and may_be_linear(d))]
    patterns = inside_patterns(kept, [module_of(d.tensor.name) for d in quantized(decisions)], family)
    named = {module_of(d.tensor.name) for d in kept}
    # A pattern says what its names say, and also fits the names that engines have inside.
    named = {name for name in named if not any(pattern.match(name) for pattern in patterns)}
    tied = {module_of(name) for _, name in family.tied_pairs(config) if name.endswith(".weight")}
    stacks = {found[1] for d in decisions if len(d.tensor.shape) == 3 and (found := STACK.match(d.tensor.name))}
    regular = {pattern.pattern for pattern in patterns} | {rf"{re.escape(stack)}\..+$" for stack in stacks}
    if family.is_generic:
        regular |= _unnamed(decisions, [module_of(d.tensor.name) for d in kept], family)
    return sorted(named | tied) + sorted(f"re:{pattern}" for pattern in regular)


def _unnamed(decisions: Sequence[Decision], kept: Sequence[str], family: Family) -> set[str]:
    """Return patterns for modules that are kept, and that no name of a stored weight tells."""
    heads = {d.action for d in decisions if d.tensor.role == "head" and d.action != "drop"}
    found = set() if "quantize" in heads else set(tied_patterns(family, kept, has_head=bool(heads)))
    plain = [d for d in decisions if d.action in ("keep", "cast")]
    within = {name for d in plain for name in modules_within(d.tensor.name, family)}
    found |= {rf"(?:.*\.)?{re.escape(WRAPPERS.sub('', name))}$" for name in within}
    others = [module_of(d.tensor.name) for d in quantized(decisions)]
    return {pattern for pattern in found if not any(re.match(pattern, other) for other in others)}


def targets_of(members: Sequence[Decision], everything: Sequence[str]) -> list[str]:
    """Return targets that match these modules, and of `everything` no others: names, or patterns for experts."""
    names = [module_of(d.tensor.name) for d in members if d.tensor.role != "expert"]
    experts = {module_of(d.tensor.name) for d in members if d.tensor.role == "expert"}
    others = [name for name in everything if name not in experts]
    return sorted(names) + list(_patterns(experts, others))


def _patterns(wanted: set[str], others: Sequence[str]) -> Iterator[str]:
    """Yield few patterns that match many experts: of all layers, of one layer, of one projection, or one by one.

    A pattern is taken only if it matches none of `others`.
    """
    left = set(wanted)
    for candidates in (_all_layers, _one_layer, _one_projection, _one):
        found = sorted({pattern for name in left for pattern in candidates(name)})
        for pattern in found:
            matches = re.compile(pattern).match
            if any(matches(name) for name in left) and not any(matches(name) for name in others):
                left = {name for name in left if not matches(name)}
                yield f"re:{pattern}"


def _all_layers(name: str) -> Iterator[str]:
    if found := EXPERTS.match(name):
        yield re.sub(r"\d+", r"\\d+", re.escape(found[1])) + r"\.\d+\..+$"


def _one_layer(name: str) -> Iterator[str]:
    if found := EXPERTS.match(name):
        yield re.escape(found[1]) + r"\.\d+\..+$"


def _one_projection(name: str) -> Iterator[str]:
    yield re.sub(r"\d+", r"\\d+", re.escape(name)) + "$" if not re.search(r"[a-z]\d", name) else re.escape(name) + "$"


def _one(name: str) -> Iterator[str]:
    yield re.escape(name) + "$"


# --- schemes


def format_of(scheme: Scheme) -> str:
    """Return compressed-tensors' name of a scheme's format."""
    if isinstance(scheme, RowScaled):
        return f"{scheme.type}-quantized"
    return {PackedInt: "pack-quantized", Fp8Block: "float-quantized", CompressedNvfp4: "nvfp4-pack-quantized",
            CompressedMxfp4: "mxfp4-pack-quantized"}[type(scheme)]  # fmt: skip


def arguments(bits: int, number: str, strategy: str, **settings: Any) -> dict[str, Any]:
    """Return all keys of compressed-tensors' QuantizationArgs, with its defaults where nothing is given."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": bits,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": number,
        "zp_dtype": None,
        **settings,
    }


def weights_of(scheme: Scheme) -> dict[str, Any]:
    """Return the QuantizationArgs of a scheme's weights."""
    if isinstance(scheme, RowScaled):
        return arguments(8, scheme.type, "channel")
    if isinstance(scheme, Fp8Block):
        return arguments(8, "float", "block", block_structure=[BLOCK, BLOCK])
    if isinstance(scheme, CompressedNvfp4):
        return arguments(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
    if isinstance(scheme, CompressedMxfp4):
        return arguments(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
    assert isinstance(scheme, PackedInt), scheme
    zeros = None if scheme.symmetric else "torch.int8"
    return arguments(
        scheme.bits, "int", "group", group_size=scheme.group_size, symmetric=scheme.symmetric, zp_dtype=zeros
    )


def activations_of(scheme: Scheme) -> dict[str, Any] | None:
    """Return the QuantizationArgs of activations, which the engine quantizes as it runs; None if it does not."""
    if isinstance(scheme, RowScaled):
        return arguments(8, scheme.type, "token", dynamic=True)
    if isinstance(scheme, Fp8Block):
        return arguments(8, "float", "group", dynamic=True, group_size=BLOCK)
    if isinstance(scheme, CompressedMxfp4) and scheme.activations:
        return arguments(4, "float", "group", dynamic=True, group_size=32, scale_dtype="torch.uint8")
    return None


# --- warnings


def warnings(decisions: Sequence[Decision], family: Family) -> list[str]:
    """Return what vLLM does with the output unexpectedly; of transformers, `loaders.lint` says it."""
    found = quantized(decisions)
    return [*_single_experts(decisions, family), *_dtypes(found), *_fused(decisions)]


def _single_experts(decisions: Sequence[Decision], family: Family) -> Iterator[str]:
    is_single = any(d.tensor.role == "expert" and d.action != "drop" for d in decisions)
    if is_single and any(stack.only_vllm for stack in family.stacks):
        yield (
            "experts are named one by one, as llm-compressor does and vLLM reads them since September 2026;"
            " transformers 5.23 knows only stacks of them in this model, and fills in random numbers: for transformers"
            " choose a quant of bitsandbytes, which leaves the stacks whole"
        )


def is_asymmetric(scheme: Decoder | None) -> bool:
    """Whether a scheme's codes have zero points."""
    return isinstance(scheme, PackedInt) and not scheme.symmetric


def fails_for_experts(scheme: Decoder | None) -> bool:
    """Whether transformers 5.23 stops at experts in this scheme."""
    is_int8 = isinstance(scheme, RowScaled) and scheme.type == "int"
    return is_int8 or isinstance(scheme, Fp8Block) or is_asymmetric(scheme)


def name_of(scheme: Decoder | None) -> str:
    """Return compressed-tensors' name of a scheme."""
    if isinstance(scheme, RowScaled):
        return "FP8_DYNAMIC" if scheme.type == "float" else "W8A8"
    if isinstance(scheme, PackedInt):
        return f"W{scheme.bits}A16{'' if scheme.symmetric else '_ASYM'}"
    if isinstance(scheme, CompressedMxfp4):
        return "MXFP4" if scheme.activations else "MXFP4A16"
    return "FP8_BLOCK" if isinstance(scheme, Fp8Block) else "NVFP4A16"


def _dtypes(found: Sequence[Decision]) -> Iterator[str]:
    if any(d.tensor.dtype.name == "F16" for d in found if isinstance(d.scheme, CompressedNvfp4)):
        yield (
            "NVFP4 of float16 weights: compressed-tensors computes in float16, where the global scale overflows below a"
            " largest magnitude of 0.041, and is left out; such tensors get coarse scales: cast to bfloat16 first"
            f" ({setting('quantize')}=none {setting('dtype')}=bfloat16)"
        )


def _fused(decisions: Sequence[Decision]) -> Iterator[str]:
    groups: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.tensor.group is not None and decision.action != "drop":
            groups.setdefault(decision.tensor.group, []).append(decision)
    unlike = [
        name for name, group in groups.items()
        if any(d.action == "quantize" for d in group) and len({d.scheme for d in group}) > 1
    ]  # fmt: skip
    if unlike:
        yield (
            f"{counted(len(unlike), 'fused group has', 'fused groups have')} several schemes ({unlike[0]} first):"
            " vLLM fuses their layers and refuses"
            " that; transformers loads them"
        )
    ragged = [
        name for name, group in groups.items()
        if any(isinstance(d.scheme, Fp8Block) and d.tensor.shape[0] % BLOCK for d in group[:-1])
    ]  # fmt: skip
    if ragged:
        yield (
            f"{counted(len(ragged), 'fused group has', 'fused groups have')} rows that are no multiple of {BLOCK}"
            f" ({ragged[0]} first): vLLM refuses"
            " FP8_BLOCK layers whose blocks would cross the parts of a fused one; keep them by a rule"
        )
