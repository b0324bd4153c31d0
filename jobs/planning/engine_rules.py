"""The rules that decide about a target's tensors after the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.planning.targets import Target
from loaders.architectures.gguf_config import facts_of
from loaders.architectures.layers import layers_of
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
        return (*dropped, *_usual(target, sources.tensors, config))
    layers = layers_of(config, (tensor.name for tensor in sources.tensors))
    is_copy = target.scheme == Plain() and isinstance(layout, HfLayout)
    beyond = () if is_copy else left_out(layers)
    has_none = layout.no_next_tokens(checkpoint) if isinstance(layout, Forming) else None
    # A mix chooses by a tensor's place among the layers of the output.
    gone = {name for rule in beyond for name in rule.names or ()}
    gone |= {*layers.predicting} if has_none is not None or target.next_tokens == "drop" else set()
    usual = _usual(target, [tensor for tensor in sources.tensors if tensor.name not in gone], config)
    next_tokens = next_token_rules(
        target.next_tokens, target.scheme, layers.predicting, usual, has_none=has_none,
        is_gguf=isinstance(layout, GgufLayout),
    )  # fmt: skip
    return (*beyond, *dropped, *next_tokens, *usual)


def _usual(target: Target, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]) -> tuple[Rule, ...]:
    return default_rules(target.scheme) if target.mix is None else target.mix.rules(tensors, config)
