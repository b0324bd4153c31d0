"""The warnings of a plan: what may surprise the user, shown before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loaders.backends.machine import has_avx512_bf16
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.layouts import Layout, compressed_tensors
from loaders.layouts.engines import builds_own_class, wants_stacks
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitsandbytes_4bit import CPU_ROWS, Bnb4
from loaders.quantization.schemes.plain import Plain
from loaders.rules.refusals import ragged_notes
from loaders.rules.rule import Decision
from loaders.tensors.sources import is_stack


def warnings(
    checkpoint: Checkpoint,
    scheme: Scheme,
    decisions: Sequence[Decision],
    config: Mapping[str, Any] | None,
    layout: Layout,
) -> list[str]:
    """Return the warnings about a target's plan, one line each."""
    if isinstance(scheme, Plain):
        return []
    said = []
    quantized = [d for d in decisions if d.action == "quantize"]
    if not quantized and layout.name != "gguf":
        said.append("nothing is quantized: no tensor is one that the engine and your rules let be quantized")
    experts = [d for d in decisions if d.tensor.role == "expert"]
    kept = [d for d in experts if d.action != "quantize"]
    single = [d for d in kept if not is_stack(d.tensor)]
    if single and layout.name != "gguf":
        total = sum(d.tensor.source_bytes for d in decisions)
        share = sum(d.tensor.source_bytes for d in single) / total
        is_own = bool(single[0].rule.label)  # whoever kept them by a rule needs no rule against it
        cure = "" if is_own else ". To quantize them all the same: rules='[{role: expert, action: quantize}]'"
        said.append(
            f"mixture of experts: {len(single)} expert matrices, {share:.0%} of the weights, stay"
            f" {single[0].tensor.dtype.torch}: {single[0].rule.why}{cure}"
        )
    stacks = [d for d in decisions if d.action in ("keep", "cast") and is_stack(d.tensor)]
    if stacks and layout.name != "gguf":
        share = sum(d.tensor.source_bytes for d in stacks) / sum(d.tensor.source_bytes for d in decisions)
        said.append(
            f"mixture of experts: {len(stacks)} stacks of experts, {share:.0%} of the weights, stay"
            f" {stacks[0].tensor.dtype.torch} ({stacks[0].tensor.name} {list(stacks[0].tensor.shape)} first):"
            f" {scheme.engine} quantizes no stack"
        )
    if (
        len(kept) < len(experts)
        and builds_own_class([scheme.engine])
        and wants_stacks(scheme.engine, checkpoint.family)
    ):
        said.append(
            "experts are quantized one by one, as you ask: transformers 4 (and tools built on it) load them;"
            " transformers 5 fuses experts and fails on such names with a size mismatch"
        )
    said += ragged_notes(decisions)
    said += _stopping_cpu_kernel(quantized)
    if scheme.engine == "compressed-tensors":
        said += compressed_tensors.warnings(decisions, checkpoint.family)
    if checkpoint.family.is_generic:
        model_type = checkpoint.config.get("model_type", "none")
        said.append(
            f"model_type {model_type!r} is not known: every matrix not named like an embedding, norm, head, router or"
            " expert is taken for a linear layer; check the list (tensors=all), and that the engine loads the output"
        )
    if config is None and layout.name != "gguf":
        said.append("the source has no config.json: the engine will need one with a quantization_config")
    return said


def _stopping_cpu_kernel(quantized: Sequence[Decision]) -> list[str]:
    """Return a warning about matrices that bitsandbytes cannot compute with on some CPUs."""
    found = [d.tensor for d in quantized if isinstance(d.scheme, Bnb4) and d.scheme.stops_cpu_kernel(d.tensor.shape)]
    if not found:
        return []
    is_here = ", such as this machine's," if has_avx512_bf16() else ""
    return [
        f"{len(found)} matrices ({found[0].name} {list(found[0].shape)} first) stop bitsandbytes on a CPU with"
        f" AVX512-BF16{is_here} at their first use (N must be divisible by block_n): there it needs rows in multiples"
        f" of {CPU_ROWS} and columns in multiples of the group size; GPUs run them; keep them by a rule if such a CPU"
        " is to run the output"
    ]
