"""The warnings of a plan: what may surprise the user, shown before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loaders.architectures.diffusers import DiffusersClass, class_of
from loaders.backends.machine import has_avx512_bf16
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.layouts import Layout, compressed_tensors
from loaders.layouts.diffusers import is_of_diffusers, parts_of
from loaders.layouts.engines import builds_own_class, wants_stacks
from loaders.lint import compressed_tensors as compressed_tensors_lint
from loaders.lint.engines import engine_of
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitsandbytes_4bit import CPU_ROWS, Bnb4
from loaders.quantization.schemes.plain import Plain
from loaders.rules.refusals import ragged_notes, undivided_notes
from loaders.rules.rule import Decision
from loaders.specs import Slot
from loaders.tensors.sources import is_stack
from loaders.words import counted, model_type_said, size

HERE = ", such as this machine's,"  # the words of a warning that depend on where it is made


def warnings(
    checkpoint: Checkpoint,
    scheme: Scheme,
    decisions: Sequence[Decision],
    config: Mapping[str, Any] | None,
    layout: Layout,
    stored: Mapping[str, Sequence[Slot]],
) -> list[str]:
    """Return the warnings about a target's plan, one line each; `stored` has what is written of each tensor."""
    sizes = {name: sum(slot.size for slot in slots) for name, slots in stored.items()}
    if isinstance(scheme, Plain):
        return [*_grown(decisions, sizes), *_decoded(checkpoint, scheme, decisions, layout)]
    said = []
    quantized = [d for d in decisions if d.action == "quantize"]
    if not quantized and layout.name != "gguf":
        said.append("nothing is quantized: no tensor is one that the engine and your rules let be quantized")
    if layout.name != "gguf":
        said += _experts(checkpoint, scheme, decisions)
    said += [*ragged_notes(decisions), *undivided_notes(scheme, decisions)]
    said += _stopping_cpu_kernel(quantized)
    said += _grown(decisions, sizes)
    said += _again(quantized) if layout.name != "gguf" or checkpoint.container != "gguf" else []
    if scheme.engine == "compressed-tensors":
        of_schemes = [(d.scheme, d.tensor.dtype.name, d.tensor.role) for d in quantized]
        said += [finding.warning for finding in compressed_tensors_lint.of_schemes(of_schemes)]
        said += compressed_tensors.warnings(decisions, checkpoint.family)
    if is_of_diffusers(checkpoint):
        said += _of_parts(checkpoint, quantized)
    elif checkpoint.family.is_generic:
        # Where an engine can be asked, what it said, or that it was not asked, stands beside the plan.
        is_asked = engine_of(layout.name, scheme) is not None
        check = "check the list (tensors=all)" + ("" if is_asked else ", and that the engine loads the output")
        said.append(
            f"{model_type_said(checkpoint.config)} is not known: every matrix not named like an embedding, norm, head,"
            f" router or expert is taken for a linear layer; {check}"
        )
    if config is None and layout.name != "gguf" and not checkpoint.components:
        said.append("the source has no config.json: the engine will need one with a quantization_config")
    return said


def _of_parts(checkpoint: Checkpoint, quantized: Sequence[Decision]) -> list[str]:
    """Return warnings about each quantized component of diffusers."""
    said = []
    for prefix, part in parts_of(checkpoint).items():
        mine = [decision for decision in quantized if decision.tensor.name.startswith(prefix)]
        if not mine:
            continue
        name, where = class_of(part.config), prefix.rstrip("/") or "the component"
        if not part.config:
            said.append(f"{where} has no config.json: the engine will need one with a quantization_config")
        elif part.family.is_generic and (name is None or not DiffusersClass(name).is_known):
            what = model_type_said(part.config) if name is None else f"class {name!r:.80}"
            said.append(
                f"{where}: {what} is not known: every matrix not named like a table for lookups is taken for a linear"
                " layer; check the list (tensors=all)"
            )
        # Other models say in config.json in which dtype they are loaded.
        if name is not None and any(isinstance(d.scheme, Bnb4) and d.tensor.dtype.name == "F32" for d in mine):
            said.append(
                f"{where} is stored in float32, in which its 4-bit layers compute unless quant.compute_dtype=bfloat16"
                " (or float16) says another"
            )
    return said


def _experts(checkpoint: Checkpoint, scheme: Scheme, decisions: Sequence[Decision]) -> list[str]:
    """Return warnings about experts: those that stay, and those that transformers 5 does not load."""
    said = []
    total = sum(d.tensor.source_bytes for d in decisions)
    experts = [d for d in decisions if d.tensor.role == "expert"]
    kept = [d for d in experts if d.action != "quantize"]
    single = [d for d in kept if not is_stack(d.tensor)]
    if single:
        share = sum(d.tensor.source_bytes for d in single) / total
        is_own = bool(single[0].rule.label)  # whoever kept them by a rule needs no rule against it
        cure = "" if is_own else ". To quantize them all the same: rules='[{role: expert, action: quantize}]'"
        said.append(
            f"mixture of experts: {counted(len(single), 'expert matrix', 'expert matrices')}, {share:.0%} of the"
            f" weights, {_stay(single)} {single[0].tensor.dtype.torch}: {single[0].rule.why}{cure}"
        )
    stacks = [d for d in decisions if d.action in ("keep", "cast") and is_stack(d.tensor)]
    if stacks:
        share = sum(d.tensor.source_bytes for d in stacks) / total
        first = stacks[0].tensor
        said.append(
            f"mixture of experts: {counted(len(stacks), 'stack')} of experts, {share:.0%} of the weights,"
            f" {_stay(stacks)} {first.dtype.torch} ({first.name} {list(first.shape)} first): {stacks[0].rule.why}"
        )
    is_stacked = builds_own_class([scheme.engine]) and wants_stacks(scheme.engine, checkpoint.family)
    if len(kept) < len(experts) and is_stacked:
        said.append(
            "experts are quantized one by one, as you ask: transformers 4 (and tools built on it) load them;"
            " transformers 5 fuses experts and fails on such names with a size mismatch"
        )
    return said


def _stay(some: Sequence[Decision]) -> str:
    return "stays" if len(some) == 1 else "stay"


def _grown(decisions: Sequence[Decision], sizes: Mapping[str, int]) -> list[str]:
    """Return a warning about an output that is larger than its source."""
    before, after = sum(d.tensor.source_bytes for d in decisions), sum(sizes.values())
    written = [(d.tensor, sizes.get(d.tensor.name, 0)) for d in decisions]
    grown = [(tensor, now) for tensor, now in written if now > tensor.source_bytes]
    if after <= before or not grown:
        return []
    first = grown[0][0]
    source, output = sum(tensor.source_bytes for tensor, _ in grown), sum(now for _, now in grown)
    kinds = dict.fromkeys(tensor.decode.kind for tensor, _ in grown if tensor.decode is not None)
    which = f"the source, already quantized ({', '.join(kinds)}), needs" if kinds else "the source needs"
    return [
        f"the output is larger than the source, {size(after)} instead of {size(before)}:"
        f" {counted(len(grown), 'tensor takes', 'tensors take')} {size(output)}, for which {which} {size(source)}"
        f" ({first.name} first)"
    ]


def _decoded(checkpoint: Checkpoint, scheme: Plain, decisions: Sequence[Decision], layout: Layout) -> list[str]:
    """Return a note about a quantized GGUF that nobody asked to be decoded."""
    decoded = [d.tensor for d in decisions if d.tensor.decode is not None]
    if checkpoint.container != "gguf" or layout.name == "gguf" or scheme.dtype is not None or not decoded:
        return []
    return [
        f"{counted(len(decoded), 'tensor is', 'tensors are')} decoded from what the GGUF stores, and not copied;"
        " output=gguf copies it as it is"
    ]


def _again(quantized: Sequence[Decision]) -> list[str]:
    """Return a warning about weights that are quantized a second time."""
    again = [d.tensor for d in quantized if d.tensor.decode is not None]
    if not again:
        return []
    kinds = dict.fromkeys(tensor.decode.kind for tensor in again if tensor.decode is not None)
    return [
        f"{counted(len(again), 'tensor is', 'tensors are')} quantized already in the source ({', '.join(kinds)})"
        " and quantized again, from what they decode to: more is lost than from the weights they came from"
    ]


def _stopping_cpu_kernel(quantized: Sequence[Decision]) -> list[str]:
    """Return a warning about matrices that bitsandbytes cannot compute with on some CPUs."""
    found = [
        (d.tensor, why)
        for d in quantized
        if isinstance(d.scheme, Bnb4) and (why := d.scheme.stops_cpu_kernel(d.tensor.shape)) is not None
    ]
    if not found:
        return []
    (first, why), is_one = found[0], len(found) == 1
    is_here = HERE if has_avx512_bf16() else ""
    return [
        f"{counted(len(found), 'matrix', 'matrices')} ({first.name} {list(first.shape)}"
        f"{'' if is_one else ' first'}: {why}) {'stops' if is_one else 'stop'} bitsandbytes on a CPU with"
        f" AVX512-BF16{is_here} at {'its' if is_one else 'their'} first use: there its kernel takes rows in multiples"
        f" of {CPU_ROWS} and columns in multiples of the group size; GPUs take any; keep {'it' if is_one else 'them'}"
        " by a rule if such a CPU is to run the output"
    ]
