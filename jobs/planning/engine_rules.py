"""The rules that decide about a target's tensors after the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.planning.targets import Target
from loaders.architectures.gguf_config import facts_of
from loaders.architectures.layers import layers_of
from loaders.checkpoints import pipeline
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import gguf
from loaders.errors import BadSpec, setting
from loaders.layouts import Forming
from loaders.layouts.gguf.layout import GgufLayout
from loaders.layouts.hf import HfLayout
from loaders.quantization.schemes.plain import Plain
from loaders.rules.defaults import default_rules, left_out
from loaders.rules.next_tokens import next_token_rules
from loaders.rules.rule import Rule
from loaders.tensors.logical_tensor import LogicalTensor
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

    What the model of config.json does not have is dropped first, except from a copy, which leaves all as it is.

    Raises:
        BadSpec: the engine cannot do with layers for multi-token prediction what the target asks.
    """
    layout, config = target.layout, checkpoint.config
    dropped = layout.left_out(checkpoint) if isinstance(layout, Forming) else ()
    if checkpoint.container == "gguf":
        if target.next_tokens != "auto":
            raise BadSpec(f"{setting('mtp')}: a GGUF's layers stay as they are; only auto goes with this source")
        if not config:  # of an architecture that is copied or quantized, but not read
            config = facts_of(gguf.plain(gguf.read_metadata(checkpoint.source, checkpoint.files[0].name)))
        return (*dropped, *_usual(target, checkpoint, sources.tensors, config))
    layers = layers_of(config, (tensor.name for tensor in sources.tensors))
    is_copy = target.scheme == Plain() and isinstance(layout, HfLayout)
    beyond = () if is_copy else left_out(layers)
    has_none = layout.no_next_tokens(checkpoint) if isinstance(layout, Forming) else None
    # A mix chooses by a tensor's place among the layers of the output.
    gone = {name for rule in beyond for name in rule.names or ()}
    gone |= {*layers.predicting} if has_none is not None or target.next_tokens == "drop" else set()
    usual = _usual(target, checkpoint, [tensor for tensor in sources.tensors if tensor.name not in gone], config)
    next_tokens = next_token_rules(
        target.next_tokens, target.scheme, layers.predicting, usual, has_none=has_none,
        is_gguf=isinstance(layout, GgufLayout),
    )  # fmt: skip
    return (*beyond, *dropped, *next_tokens, *passed_through(checkpoint, target), *usual)


def _usual(
    target: Target, checkpoint: Checkpoint, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]
) -> tuple[Rule, ...]:
    if target.mix is None:
        return default_rules(target.scheme, checkpoint.family)
    return target.mix.rules(tensors, config)
