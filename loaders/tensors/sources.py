"""The logical tensors of a checkpoint: plain ones as they are, quantized ones by their decoder, tied ones once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loaders.architectures.templates import KnownTraits
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import WEIGHT_DTYPES
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.strategies import small_reader
from loaders.tensors.expert_stacks import cut
from loaders.tensors.logical_tensor import LogicalTensor, in_natural_order, known, plain_tensor
from loaders.tensors.quantized_sources import mlx, quantized_tensors

COMPARE_BYTES = 4 << 20  # bytes of two tied tensors compared at a time, so that large embeddings take little memory
EXPERTS = re.compile(r"(?:^|\.)experts?\.")
DERIVED = ("rope_freqs.weight",)  # tensors of a GGUF that follow from its metadata, here from the rope scaling


@dataclass(frozen=True, slots=True)
class Sources:
    """A checkpoint's logical tensors, and what was found on the way to them.

    `tied` are (kept, dropped) names, which the engine ties again when it loads; `notes` are for the user.
    """

    tensors: tuple[LogicalTensor, ...]
    tied: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def tensors_of(checkpoint: Checkpoint, *, decode: bool, split: bool = False) -> Sources:
    """Return the logical tensors of a checkpoint, in natural order of blocks and names.

    With `decode`, the stored parts of a weight that a known scheme quantized become one tensor, which decodes them.
    Without, every stored tensor is its own, as it is, and those of a GGUF keep their order. With `split`, stacks of
    experts that the family knows are cut into the experts' tensors.

    Raises:
        BadCheckpoint: a quantized weight lacks one of its parts.
    """
    family = checkpoint.family
    by_name = {spec.name: spec for spec in checkpoint.weights}
    tied, notes = _tied(checkpoint, by_name)
    gone = {dropped for _, dropped in tied}
    quantized = quantized_tensors(checkpoint) if decode else {}
    parts = {spec.name for found in quantized.values() for _, spec in found.stored}
    found, beside = list(quantized.values()), dict[str, str]()
    for spec in checkpoint.weights:
        if spec.name not in gone and spec.name not in parts and not (decode and spec.name in DERIVED):
            for name, part in mlx.cut_stored(checkpoint, spec) if split else [(spec.name, spec)]:
                found.append(plain_tensor(name, part))
                if not decode:
                    beside[name] = _weight_of(name, spec, by_name)
    if split:
        found = [piece for tensor in found for piece in cut(tensor, family)]
    traits_of = KnownTraits(family)
    tensors = [known(tensor, traits_of, beside.get(tensor.name)) for tensor in found]
    if split:
        notes = (*notes, *_unknown_stacks(checkpoint, tensors))
    if checkpoint.container == "gguf" and not decode:  # for another GGUF, which keeps the order of the source
        files = {tag.name: number for number, tag in enumerate(checkpoint.files)}
        tensors.sort(key=lambda tensor: (files[tensor.stored[0][1].file], tensor.stored[0][1].offset))
    else:
        tensors = in_natural_order(tensors)
    return Sources(tuple(tensors), tied, notes)


def _weight_of(name: str, stored: WeightSpec, by_name: Mapping[str, WeightSpec]) -> str:
    """Return the weight to which a copied tensor belongs, whose block it takes, so that one unit has both."""
    module, _, suffix = stored.name.rpartition(".")
    is_part = suffix in ("scales", "biases") and f"{module}.weight" in by_name
    return name.removesuffix(suffix) + "weight" if is_part else name


def _unknown_stacks(checkpoint: Checkpoint, tensors: Sequence[LogicalTensor]) -> list[str]:
    whole = [r for r in tensors if len(r.shape) == 3 and r.dtype.name in WEIGHT_DTYPES and EXPERTS.search(r.name)]
    if not whole:
        return []
    return [
        f"{len(whole)} stacks of experts stay whole and unquantized, {whole[0].name} {list(whole[0].shape)} first:"
        f" which of their dimensions are outputs is not known for model_type {checkpoint.config.get('model_type')!r}"
    ]


def _tied(
    checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec]
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Return the tensors that the engine ties to others, so that they are not written, and notes about odd ones.

    A tied pair that is stored twice stays tied only if both hold the same bytes, as in transformers.
    """
    tied, notes = [], []
    for kept, dropped in checkpoint.family.tied_pairs(checkpoint.config):
        if kept in by_name and dropped in by_name:
            if _same_bytes(checkpoint.source, by_name[kept], by_name[dropped]):
                tied.append((kept, dropped))
            else:
                notes.append(f"config.json ties {dropped} to {kept}, but their weights differ: both are kept, untied")
    known = {dropped for _, dropped in tied}
    shared = [spec for spec in checkpoint.weights if spec.alias is not None and spec.name not in known]
    pairs = {frozenset(pair) for pair in tied}
    for spec in shared:
        if frozenset((spec.name, spec.alias)) not in pairs:
            notes.append(
                f"{spec.name} shares its bytes with {spec.alias}; config.json does not tie them: both are written"
            )
    return tuple(tied), tuple(notes)


def _same_bytes(source: PinnedFiles, one: WeightSpec, other: WeightSpec) -> bool:
    if (one.dtype, one.shape, one.stride, one.size) != (other.dtype, other.shape, other.stride, other.size):
        return False
    if (one.file, one.offset) == (other.file, other.offset):
        return True
    with small_reader(source, (one, other)) as reader:
        return all(
            np.array_equal(reader.read(one, at, at + n, slot=0), reader.read(other, at, at + n, slot=1))
            for at in range(0, one.size, COMPARE_BYTES)
            for n in (min(COMPARE_BYTES, one.size - at),)
        )
