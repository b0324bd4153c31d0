"""The logical tensors of a checkpoint: plain ones as they are, quantized ones by their decoder, tied ones once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loaders.architectures.gguf import architecture_of
from loaders.architectures.layers import layers_of
from loaders.architectures.templates import KnownTraits
from loaders.checkpoints import pipeline
from loaders.checkpoints.adapter import AdapterFile
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import WEIGHT_DTYPES
from loaders.errors import BadSpec
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.strategies import small_reader
from loaders.tensors.expert_stacks import cut_all
from loaders.tensors.logical_tensor import LogicalTensor, in_natural_order, known, plain_tensor, transposed
from loaders.tensors.quantized_sources import find_quantized, mlx
from loaders.words import counted, model_type_said

COMPARE_BYTES = 4 << 20  # bytes of two tied tensors compared at a time, so that large embeddings take little memory
# Roles of what is joined with other tensors: a tower's layers are quantized for no engine that keeps the tower.
JOINED = {"linear": "fused", "vision": "sensitive"}
CONVOLUTION = 16  # the largest kernel that is taken for one: a stack of experts has more inputs than that
DERIVED = ("rope_freqs.weight",)  # tensors of a GGUF that follow from its metadata, here from the rope scaling


@dataclass(frozen=True, slots=True)
class Sources:
    """A checkpoint's logical tensors, and what was found on the way to them.

    `tied` are (kept, dropped) names, which the engine ties again when it loads; `notes` are for the user. `adapter` is
    the file of what was merged into them.
    """

    tensors: tuple[LogicalTensor, ...]
    tied: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    adapter: AdapterFile | None = None

    @property
    def parameters(self) -> int:
        """The number of the model's weights: of all tensors but those of integers, such as positions."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors if not tensor.dtype.is_integer)


def tensors_of(checkpoint: Checkpoint, *, decode: bool, split: bool = False, check: bool = True) -> Sources:
    """Return the logical tensors of a checkpoint, in natural order of blocks and names.

    With `decode`, the stored parts of a weight that a known scheme quantized become one tensor, which decodes them.
    Without, every stored tensor is its own, as it is, and those of a GGUF keep their order. With `split`, stacks of
    experts that the family knows are cut into the experts' tensors. Without `check`, what the checkpoint says of its
    quantization may differ from what is stored: for showing a checkpoint, not for using it.

    Raises:
        BadCheckpoint: a quantized weight lacks one of its parts, or is not as the checkpoint says.
    """
    if checkpoint.components:
        return _of_components(
            {
                part: tensors_of(each, decode=decode, split=split, check=check)
                for part, each in checkpoint.components.items()
            }
        )
    family = checkpoint.family
    by_name = {spec.name: spec for spec in checkpoint.weights}
    tied, notes = _tied(checkpoint, by_name)
    if checkpoint.container != "gguf":  # whose config is made from its own tensors
        notes = (*notes, *layers_of(checkpoint.config, by_name).notes)
    quantized = find_quantized(checkpoint, decode=decode, check=check)
    notes = (*notes, *quantized.notes)
    gone = {dropped for _, dropped in tied} | quantized.added
    parts = {spec.name for found in quantized.weights.values() for _, spec in found.stored}
    found, beside = list(quantized.weights.values()), dict[str, str]()
    for spec in checkpoint.weights:
        if spec.name not in gone and spec.name not in parts and not (decode and spec.name in DERIVED):
            for name, part in mlx.cut_stored(checkpoint, spec) if split else [(spec.name, spec)]:
                found.append(plain_tensor(name, part))
                if not decode:
                    beside[name] = _weight_of(name, spec, by_name)
    if split:
        found = list(cut_all(found, family))
    if checkpoint.container == "gguf" and not decode:
        found = _roles_of_gguf(checkpoint, found)
    traits_of = KnownTraits(family)
    tensors = [_turned(_with_traits(tensor, traits_of, beside.get(tensor.name))) for tensor in found]
    tensors = _apart(tensors)
    if checkpoint.container != "gguf":
        tensors = _stacked(tensors)
    if split:
        notes = (*notes, *_unknown_stacks(checkpoint, tensors))
    if checkpoint.container == "gguf" and not decode:  # for another GGUF, which keeps the order of the source
        files = {tag.name: number for number, tag in enumerate(checkpoint.files)}
        tensors.sort(key=lambda tensor: (files[tensor.stored[0][1].file], tensor.stored[0][1].offset))
    else:
        tensors = in_natural_order(tensors)
    return Sources(tuple(tensors), tied, notes)


def _of_components(parts: Mapping[str, Sources]) -> Sources:
    """Return the tensors of a pipeline, each under its component's name; components follow one another."""
    return Sources(
        tensors=tuple(_within(part, tensor) for part, sources in parts.items() for tensor in sources.tensors),
        tied=tuple((f"{part}/{kept}", f"{part}/{gone}") for part, each in parts.items() for kept, gone in each.tied),
        notes=tuple(f"{part}: {note}" for part, sources in parts.items() for note in sources.notes),
    )


def _within(part: str, tensor: LogicalTensor) -> LogicalTensor:
    return replace(
        tensor,
        name=f"{part}/{tensor.name}",
        stored=tuple((role, pipeline.within(part, spec)) for role, spec in tensor.stored),
        block=f"{part}/{tensor.block}",
        group=None if tensor.group is None else f"{part}/{tensor.group}",
    )


def _roles_of_gguf(checkpoint: Checkpoint, tensors: Sequence[LogicalTensor]) -> list[LogicalTensor]:
    """Return tensors under a GGUF's own names with the roles of what transformers calls them, where it has them."""
    try:
        architecture, family = architecture_of(checkpoint.config), checkpoint.family
    except BadSpec:  # a GGUF of any architecture is copied, and quantized again
        return list(tensors)
    published = [architecture.hf_name(tensor.name) for tensor in tensors]
    return [
        tensor if name is None else replace(tensor, role=family.traits(name.format(0), tensor.shape).role)
        for tensor, name in zip(tensors, published, strict=True)
    ]


def _with_traits(tensor: LogicalTensor, traits_of: KnownTraits, beside: str | None) -> LogicalTensor:
    """Return a tensor with its family's traits, but for a role that its format's finder knows."""
    made = known(tensor, traits_of, beside)
    return replace(made, role=tensor.role) if tensor.role else made


def _weight_of(name: str, stored: WeightSpec, by_name: Mapping[str, WeightSpec]) -> str:
    """Return the weight to which a copied tensor belongs, whose block it takes, so that one unit has both."""
    module, _, suffix = stored.name.rpartition(".")
    is_part = suffix in ("scales", "biases") and f"{module}.weight" in by_name
    return name.removesuffix(suffix) + "weight" if is_part else name


def _apart(tensors: list[LogicalTensor]) -> list[LogicalTensor]:
    """Return the tensors; a layer beside an `in_proj_weight` belongs to torch's MultiheadAttention, no nn.Linear."""
    ending = "in_proj_weight"
    beside = {
        tensor.name.removesuffix(ending) + "out_proj.weight" for tensor in tensors if tensor.name.endswith(ending)
    }
    if not beside:
        return tensors
    return [
        replace(tensor, role=JOINED[tensor.role]) if tensor.name in beside and tensor.role in JOINED else tensor
        for tensor in tensors
    ]


def _stacked(tensors: list[LogicalTensor]) -> list[LogicalTensor]:
    """Return the tensors; a stack that its name does not tell is one of experts all the same."""
    return [replace(each, role="expert") if each.role == "other" and is_stack(each) else each for each in tensors]


def _turned(tensor: LogicalTensor) -> LogicalTensor:
    """Return a Conv1D that bitsandbytes holds as [outputs, inputs] in its model's own order again."""
    is_turned = tensor.role == "conv1d" and isinstance(tensor.decode, Bnb4 | LlmInt8)
    return transposed(tensor) if is_turned else tensor


def is_stack(tensor: LogicalTensor) -> bool:
    """Whether a tensor of a layer holds the matrices of several experts: three dimensions, and no convolution."""
    shape, is_in_layer = tensor.shape, tensor.block != tensor.name
    is_float = tensor.dtype.name in WEIGHT_DTYPES
    return is_in_layer and is_float and len(shape) == 3 and shape[0] > 1 and min(shape[1:]) > CONVOLUTION


def _unknown_stacks(checkpoint: Checkpoint, tensors: Sequence[LogicalTensor]) -> list[str]:
    whole = [tensor for tensor in tensors if is_stack(tensor)]
    if not whole:
        return []
    return [
        f"{counted(len(whole), 'stack of experts stays', 'stacks of experts stay')} whole and unquantized,"
        f" {whole[0].name} {list(whole[0].shape)} first:"
        f" how they are to be cut is not known for {model_type_said(checkpoint.config)}"
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
