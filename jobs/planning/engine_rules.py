"""The rules that decide about a target's tensors after the user's own."""

from __future__ import annotations

import re
from dataclasses import replace

from jobs.planning.targets import Target
from loaders.checkpoints import pipeline
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.layouts import Forming
from loaders.layouts.rules import layout_rules
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Rule
from loaders.tensors.sources import Sources

USUAL = "of a pipeline, transformers, UNets and text encoders are quantized; model.components_to_quantize changes it"
# Components of a pipeline that are quantized where the user says nothing: what computes most, and holds most weights.
QUANTIZED_NAMES = re.compile(r"^(?:transformer|unet|text_encoder|prior)(?:_\w+)?$")
QUANTIZED_CLASSES = re.compile(r"Transformer|UNet")


def passed_through(checkpoint: Checkpoint, target: Target) -> tuple[Rule, ...]:
    """Return the rule that keeps a pipeline's other components: VAEs, image encoders, safety checkers, ...

    Without a choice of the user's, a cast (quant=none quant.dtype=...) is of all components.
    """
    if not checkpoint.components or (target.components is None and isinstance(target.scheme, Plain)):
        return ()
    classes, wanted = pipeline.classes_of(checkpoint.config), target.components
    left = [
        part
        for part in checkpoint.components
        if (not _is_quantized(part, classes[part]) if wanted is None else part not in wanted)
    ]
    if not left:
        return ()
    why = "passed through: " + ("not in model.components_to_quantize" if wanted is not None else USUAL)
    return (Rule(action="keep", why=why, name=rf"^(?:{'|'.join(map(re.escape, left))})/"),)


def _is_quantized(part: str, class_name: str) -> bool:
    return bool(QUANTIZED_NAMES.match(part) or QUANTIZED_CLASSES.search(class_name))


def formed_sources(target: Target, checkpoint: Checkpoint, sources: Sources) -> Sources:
    """Return the tensors as the target's engine holds them, where it holds some in another form."""
    if not isinstance(target.layout, Forming):
        return sources
    return replace(sources, tensors=tuple(target.layout.formed(checkpoint, sources.tensors)))


def engine_rules(target: Target, checkpoint: Checkpoint, sources: Sources) -> tuple[Rule, ...]:
    """Return the rules that come after the user's: those of the target's mix or scheme.

    Raises:
        BadSpec: the engine cannot do with layers for multi-token prediction what the target asks.
    """
    usual = layout_rules(
        target.layout, checkpoint, sources.tensors, target.scheme, target.mix, next_tokens=target.next_tokens
    )
    return (*passed_through(checkpoint, target), *usual)
