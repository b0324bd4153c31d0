"""The rules that decide about a target's tensors after the user's own."""

from __future__ import annotations

from dataclasses import replace

from jobs.planning.targets import Target
from loaders.architectures.gguf_config import facts_of
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import gguf
from loaders.layouts import Forming
from loaders.layouts.hf import HfLayout
from loaders.quantization.schemes.plain import Plain
from loaders.rules.defaults import default_rules, left_out
from loaders.rules.rule import Rule
from loaders.tensors.sources import Sources


def formed_sources(target: Target, checkpoint: Checkpoint, sources: Sources) -> Sources:
    """Return the tensors as the target's engine holds them, where it holds some in another form."""
    if not isinstance(target.layout, Forming):
        return sources
    return replace(sources, tensors=tuple(target.layout.formed(checkpoint, sources.tensors)))


def engine_rules(target: Target, checkpoint: Checkpoint, sources: Sources) -> tuple[Rule, ...]:
    """Return the rules that come after the user's: those of the target's mix or scheme.

    What the model of config.json does not have is dropped first, except from a copy, which leaves all as it is.
    """
    config = checkpoint.config
    if not config and checkpoint.container == "gguf":  # of an architecture that is copied or quantized, but not read
        config = facts_of(gguf.plain(gguf.read_metadata(checkpoint.source, checkpoint.files[0].name)))
    usual = default_rules(target.scheme) if target.mix is None else target.mix.rules(sources.tensors, config)
    if isinstance(target.layout, Forming):
        usual = (*target.layout.left_out(checkpoint), *usual)
    is_copy = target.scheme == Plain() and isinstance(target.layout, HfLayout)
    if is_copy or checkpoint.container == "gguf":
        return usual
    return (*left_out((tensor.name for tensor in sources.tensors), checkpoint.config), *usual)
