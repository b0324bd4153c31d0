"""The rules that decide about a target's tensors after the user's own."""

from __future__ import annotations

from jobs.planning.targets import Target
from loaders.architectures.layers import layers_of
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec, setting
from loaders.layouts import Forming
from loaders.layouts.gguf.layout import GgufLayout
from loaders.layouts.hf import HfLayout
from loaders.quantization.schemes.plain import Plain
from loaders.rules.defaults import default_rules, left_out
from loaders.rules.next_tokens import next_token_rules
from loaders.rules.rule import Rule
from loaders.tensors.sources import Sources


def engine_rules(target: Target, checkpoint: Checkpoint, sources: Sources) -> tuple[Rule, ...]:
    """Return the rules that come after the user's: those of the target's mix or scheme.

    What the model of config.json does not have is dropped first, except from a copy, which leaves all as it is.

    Raises:
        BadSpec: the engine cannot do with layers for multi-token prediction what the target asks.
    """
    usual = default_rules(target.scheme) if target.mix is None else target.mix.rules(sources.tensors, checkpoint.config)
    if checkpoint.container == "gguf":
        if target.next_tokens != "auto":
            raise BadSpec(f"{setting('mtp')}: a GGUF's layers stay as they are; only auto goes with this source")
        return (*target.layout.left_out(checkpoint), *usual) if isinstance(target.layout, Forming) else usual
    layers = layers_of(checkpoint.config, (tensor.name for tensor in sources.tensors))
    next_tokens = next_token_rules(
        target.next_tokens, target.scheme, layers.predicting, usual,
        has_none=target.layout.no_next_tokens(checkpoint) if isinstance(target.layout, Forming) else None,
        is_gguf=isinstance(target.layout, GgufLayout),
    )  # fmt: skip
    dropped = target.layout.left_out(checkpoint) if isinstance(target.layout, Forming) else ()
    is_copy = target.scheme == Plain() and isinstance(target.layout, HfLayout)
    return (*(() if is_copy else left_out(layers)), *dropped, *next_tokens, *usual)
