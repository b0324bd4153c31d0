"""The rules of a layout's engine about the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from loaders.architectures.gguf_config import facts_of
from loaders.architectures.layers import layers_of
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import gguf
from loaders.errors import BadSpec, setting
from loaders.layouts.base import Forming, Layout
from loaders.layouts.gguf.layout import GgufLayout
from loaders.layouts.hf import HfLayout
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.plain import Plain
from loaders.rules.defaults import default_rules, left_out
from loaders.rules.next_tokens import NextTokens, next_token_rules
from loaders.rules.rule import Mix, Rule
from loaders.tensors.logical_tensor import LogicalTensor


def layout_rules(
    layout: Layout,
    checkpoint: Checkpoint,
    tensors: Sequence[LogicalTensor],
    scheme: Scheme,
    mix: Mix | None = None,
    next_tokens: NextTokens = "auto",
) -> tuple[Rule, ...]:
    """Return the rules of the mix, or of the scheme where there is none, after those that drop what is not written.

    What the model of config.json does not have is dropped first, except from a copy, which leaves all as it is.
    `tensors` are in the engine's form, `next_tokens` says what becomes of layers for multi-token prediction.

    Raises:
        BadSpec: the engine cannot do with layers for multi-token prediction what is asked.
    """
    config = checkpoint.config
    dropped = layout.left_out(checkpoint) if isinstance(layout, Forming) else ()
    if checkpoint.container == "gguf":
        if next_tokens != "auto":
            raise BadSpec(f"{setting('mtp')}: a GGUF's layers stay as they are; only auto goes with this source")
        if not config:  # of an architecture that is copied or quantized, but not read
            config = facts_of(gguf.plain(gguf.read_metadata(checkpoint.source, checkpoint.files[0].name)))
        return (*dropped, *(default_rules(scheme, checkpoint.family) if mix is None else mix.rules(tensors, config)))
    layers = layers_of(config, (tensor.name for tensor in tensors))
    is_copy = scheme == Plain() and isinstance(layout, HfLayout)
    beyond = () if is_copy else left_out(layers)
    has_none = layout.no_next_tokens(checkpoint) if isinstance(layout, Forming) else None
    # A mix chooses by a tensor's place among the layers of the output.
    gone = {name for rule in beyond for name in rule.names or ()}
    gone |= {*layers.predicting} if has_none is not None or next_tokens == "drop" else set()
    stay = [tensor for tensor in tensors if tensor.name not in gone]
    usual = default_rules(scheme, checkpoint.family) if mix is None else mix.rules(stay, config)
    predicting = next_token_rules(
        next_tokens, scheme, layers.predicting, usual, has_none=has_none, is_gguf=isinstance(layout, GgufLayout)
    )
    return (*beyond, *dropped, *predicting, *usual)
