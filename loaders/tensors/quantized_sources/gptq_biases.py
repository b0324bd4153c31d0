"""Biases that GPTQ's tools add: AutoGPTQ gives every quantized layer one, of zeros where the plain model has none."""

from __future__ import annotations

from collections.abc import Collection

from loaders.architectures.biases import has_bias
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.specs import WeightSpec
from loaders.strategies import small_reader
from loaders.words import counted, model_type_said

MOST = 256 << 20  # bytes of biases that are read while a checkpoint is planned


def added_biases(checkpoint: Checkpoint, quantized: Collection[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the names of biases of zeros that the plain model does not have, and notes about them.

    `quantized` are the names of the quantized weights.
    """
    modules = [name.removesuffix(".weight") for name in quantized]
    by_name = {spec.name: spec for spec in checkpoint.weights}
    mine = {module: by_name[f"{module}.bias"] for module in modules if f"{module}.bias" in by_name}
    without = {module: bias for module, bias in mine.items() if has_bias(checkpoint.config, module) is not True}
    if not without:
        return frozenset(), ()
    if sum(bias.size for bias in without.values()) > MOST:
        return frozenset(), (
            f"{len(without)} biases are kept: they are more than {MOST >> 20} MiB, too many to look at",
        )
    zero = _zeros(checkpoint, list(without.values()))
    gone = {
        module for module in without if has_bias(checkpoint.config, module) is False and without[module].name in zero
    }
    notes = []
    if gone:
        notes.append(
            f"{counted(len(gone), 'bias', 'biases')} of zeros, {without[min(gone)].name} first, dropped: GPTQ's tool"
            f" added them, and the plain model ({model_type_said(checkpoint.config)}) has none there"
        )
    unknown = [bias.name for module, bias in without.items() if module not in gone and bias.name in zero]
    if unknown:
        notes.append(
            f"{counted(len(unknown), 'bias is', 'biases are')} all zero, {unknown[0]} first, and kept: whether the"
            f" plain model has them is not known for {model_type_said(checkpoint.config)}; if not, drop them by a rule"
        )
    return frozenset(without[module].name for module in gone), tuple(notes)


def _zeros(checkpoint: Checkpoint, biases: list[WeightSpec]) -> set[str]:
    with small_reader(checkpoint.source, biases) as reader:
        return {bias.name for bias in biases if not reader.read(bias, 0, bias.size).any()}
