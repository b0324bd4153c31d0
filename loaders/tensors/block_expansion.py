"""Block expansion: additional decoder blocks that change nothing until they are trained.

LLaMA Pro (Wu et al. 2024, arXiv:2401.02415, section 3.2): the L blocks are cut into equal runs, and each run is
followed by a copy of its last block whose o_proj and down_proj are zero, so that the copy adds nothing to the residual
stream. The old blocks stay as they are, under new numbers. Biases of the two projections are zero as well, since they
would be added too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loaders.architectures.templates import KnownTraits
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec, setting
from loaders.tensors.logical_tensor import LogicalTensor, in_natural_order, known
from loaders.tensors.sources import Sources
from loaders.tensors.zeros import Zeros

# Model types whose blocks are model.layers.N, add the results of o_proj and down_proj to the stream, and depend on
# their number only in ways that the config lists.
MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma3_text")
BLOCK = re.compile(r"^model\.layers\.(?P<number>\d+)\.(?P<rest>.+)$")
ADDED = re.compile(
    r"^self_attn\.o_proj\.(?:weight|bias)$"
    r"|^mlp\.(?:(?:experts\.\d+|shared_expert)\.)?down_proj\.(?:weight|bias)$"
    r"|^mlp\.experts\.down_proj(?:\.weight)?$"
    r"|^block_sparse_moe\.experts\.\d+\.w2\.weight$"
)
PER_LAYER = ("layer_types", "mlp_layer_types")  # config.json's lists with an entry for each block
SLIDING = ("qwen2", "qwen3", "qwen2_moe")  # with use_sliding_window, a missing layer_types follows from the numbers


@dataclass(frozen=True, slots=True)
class Expansion:
    """The expansion of a model of `layers` blocks by `num_blocks` new ones."""

    layers: int
    num_blocks: int

    @property
    def origins(self) -> tuple[tuple[int, bool], ...]:
        """For each block of the result, the old block that it is a copy of, and whether it is a new block."""
        run = self.layers // self.num_blocks
        made: list[tuple[int, bool]] = []
        for layer in range(self.layers):
            made.append((layer, False))
            if (layer + 1) % run == 0:
                made.append((layer, True))
        return tuple(made)


def expansion_of(checkpoint: Checkpoint, num_blocks: int) -> Expansion:
    """Check that a checkpoint can be expanded by so many blocks, and return the expansion.

    Raises:
        BadSpec: its blocks are not known, the number does not divide theirs, or the config cannot express the result.
    """
    config = checkpoint.config
    model_type, layers = config.get("model_type"), config.get("num_hidden_layers")
    if model_type not in MODEL_TYPES:
        raise BadSpec(
            f"{setting('transform')}: block expansion knows the blocks of {', '.join(MODEL_TYPES)}; which tensors of"
            " model_type"
            f" {model_type!r} add to its residual stream is not known"
        )
    if not isinstance(layers, int) or layers < 1:
        raise BadSpec(
            f"{setting('transform')}: config.json says num_hidden_layers is {layers!r}; expected the number of blocks"
        )
    if num_blocks < 1 or layers % num_blocks:
        fitting = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise BadSpec(
            f"{setting('num_blocks')}: {num_blocks} does not divide the model's {layers} blocks; choose of {fitting}"
        )
    is_derived = model_type == "gemma3_text" or (model_type in SLIDING and config.get("use_sliding_window"))
    if "layer_types" not in config and is_derived:
        raise BadSpec(
            f"{setting('transform')}: config.json has no layer_types, and what {model_type} makes of their numbers"
            " would change: save"
            " the config with transformers 4.53 or later first"
        )
    for key in PER_LAYER:
        if config.get(key) is not None and len(config[key]) != layers:
            raise BadSpec(
                f"{setting('transform')}: config.json's {key} has {len(config[key])} entries for {layers} blocks"
            )
    if config.get("decoder_sparse_step", 1) != 1:
        raise BadSpec(
            f"{setting('transform')}: decoder_sparse_step is {config['decoder_sparse_step']}: which blocks have"
            " experts would change"
        )
    return Expansion(layers, num_blocks)


def expand_checkpoint(checkpoint: Checkpoint, num_blocks: int) -> Checkpoint:
    """Return the checkpoint with the config of the expanded model; its stored weights stay the same.

    Raises:
        BadSpec: as `expansion_of`.
    """
    return replace(checkpoint, config=_config(checkpoint.config, expansion_of(checkpoint, num_blocks)))


def _config(config: Mapping[str, Any], expansion: Expansion) -> dict[str, Any]:
    origins = expansion.origins
    made = {**config, "num_hidden_layers": len(origins)}
    for key in PER_LAYER:
        if made.get(key) is not None:
            made[key] = [config[key][origin] for origin, _ in origins]
    if made.get("mlp_only_layers"):
        made["mlp_only_layers"] = [n for n, (origin, _) in enumerate(origins) if origin in config["mlp_only_layers"]]
    if isinstance(made.get("max_window_layers"), int):
        made["max_window_layers"] = sum(origin < config["max_window_layers"] for origin, _ in origins)
    return made


def expand_sources(checkpoint: Checkpoint, sources: Sources, num_blocks: int) -> Sources:
    """Return the logical tensors of the expanded model; `checkpoint` has the config of the stored one.

    Raises:
        BadSpec: as `expansion_of`; or a block's tensors are not weights but parts of quantized ones.
    """
    expansion, traits_of = expansion_of(checkpoint, num_blocks), KnownTraits(checkpoint.family)
    blocks: dict[int, list[tuple[str, LogicalTensor]]] = {}
    made = []
    for tensor in sources.tensors:
        match = BLOCK.match(tensor.name)
        if match is None:
            made.append(tensor)
        else:
            blocks.setdefault(int(match["number"]), []).append((match["rest"], tensor))
    if sorted(blocks) != list(range(expansion.layers)):
        raise BadSpec(
            f"{setting('transform')}: expected the tensors of {expansion.layers} blocks under model.layers.N, found"
            " those of"
            f" {len(blocks)}"
        )
    for number, (origin, is_new) in enumerate(expansion.origins):
        zeroed = {rest for rest, _ in blocks[origin] if ADDED.match(rest)}
        _check_block(checkpoint, origin, blocks[origin], zeroed)
        for rest, tensor in blocks[origin]:
            moved = known(replace(tensor, name=f"model.layers.{number}.{rest}"), traits_of)
            made.append(_zeros(moved) if is_new and rest in zeroed else moved)
    return replace(sources, tensors=tuple(in_natural_order(made)))


def _check_block(checkpoint: Checkpoint, origin: int, block: list[tuple[str, LogicalTensor]], zeroed: set[str]) -> None:
    """Raise BadSpec unless both projections are there, as floats."""
    coded = [tensor.name for _, tensor in block if not tensor.dtype.is_float]
    if coded:
        raise BadSpec(
            f"{setting('transform')}: {coded[0]} is no float, but a part of a quantized weight that is copied as it"
            " is stored; choose a"
            f" quant, or give {setting('quantize')}=none a {setting('dtype')}"
        )
    has_attention = any("o_proj" in rest for rest in zeroed)
    if not has_attention or not any("o_proj" not in rest for rest in zeroed):
        missing = "down_proj" if has_attention else "o_proj"
        raise BadSpec(
            f"{setting('transform')}: block {origin} of {checkpoint.address} has no {missing} to be zero in its copy"
        )


def _zeros(tensor: LogicalTensor) -> LogicalTensor:
    return replace(tensor, stored=(), window=None, decode=Zeros(), whole=None, order=None)
