"""Checkpoints that are already quantized: which weights are, and what decodes each. One file per format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loaders.architectures.mlx import model_of
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources import (
    awq_gptq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    hqq,
    mlx,
    modelopt,
    mxfp4,
)
from loaders.tensors.quantized_sources.consistency import check_not_stale, consistency_notes
from loaders.tensors.quantized_sources.gptq_biases import added_biases
from loaders.words import model_type_said

# The finders by config.json's quant_method. Their tensors have no role, block and group yet; the family fills them in.
FINDERS: dict[str, Callable[[Checkpoint], dict[str, LogicalTensor]]] = {
    "bitsandbytes": bitsandbytes.find,
    "bitnet": bitnet.find,
    "hqq": hqq.find,
    "fp8": fp8.find,
    "compressed-tensors": compressed_tensors.find,
    "mlx": mlx.find,
    "mxfp4": mxfp4.find,
    "modelopt": modelopt.find,
    "modelopt_fp4": modelopt.find,
    "awq": awq_gptq.find_awq,
    "gptq": awq_gptq.find_gptq,
    "gguf": gguf.find,
}


def check_decodable(checkpoint: Checkpoint) -> None:
    """Check that the checkpoint's format is decoded here.

    Raises:
        BadSpec: it is not.
        BadCheckpoint: two descriptions of its quantization contradict each other.
    """
    for each in checkpoint.components.values():
        check_decodable(each)
    said = checkpoint.declaration
    if said is None or checkpoint.components:
        return
    as_stored = f"it can be copied ({setting('quantize')}=none), inspected and compared"
    if said.problem is not None:
        raise BadCheckpoint(f"{said.problem}; {as_stored} as it is stored")
    if said.method not in FINDERS:
        raise BadSpec(
            f"{setting('checkpoint')}: the checkpoint is already quantized ({said.method}), which is not decoded here;"
            f" {as_stored}; decoded are: {', '.join(sorted(FINDERS))}"
        )
    if said.method == "mlx" and model_of(checkpoint.config) is None:
        raise BadSpec(
            f"{setting('checkpoint')}: this is mlx-lm's checkpoint of"
            f" {model_type_said(checkpoint.config)}, and how mlx-lm renames that model's tensors, offsets"
            " its"
            f" norms and turns its convolutions is not known here, so that it cannot be turned back; {as_stored}; take"
            " the model as its makers published it"
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint's quantized weights by name, names of stored tensors that belong to no model, and notes."""

    weights: Mapping[str, LogicalTensor] = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def quantized_tensors(checkpoint: Checkpoint) -> Mapping[str, LogicalTensor]:
    """Return the quantized weights of a checkpoint by name; none if its format is not decoded here.

    Raises:
        BadCheckpoint: a quantized weight lacks one of its parts.
    """
    find = FINDERS.get(checkpoint.quantized_by or "")
    return {} if find is None else find(checkpoint)


def find_quantized(checkpoint: Checkpoint, *, decode: bool, check: bool) -> Found:
    """Return what is quantized in a checkpoint; with `check`, held against what the checkpoint says of itself.

    There are no weights if they are copied as they are stored, or if their format is not decoded here.

    Raises:
        BadCheckpoint: a quantized weight lacks one of its parts, or what the checkpoint says of its quantization does
            not fit what is stored.
    """
    said = checkpoint.declaration
    if said is None:
        return Found()
    if check and said.method in FINDERS:
        check_not_stale(checkpoint)
    if not decode or said.method not in FINDERS:
        is_said = said.method in FINDERS or bool(said.settings)
        return Found(notes=() if is_said else (f"quantized ({said.method}); its tensors are taken as they are stored",))
    if check and said.method == "mlx":
        mlx.check_own_settings(checkpoint)
    weights = quantized_tensors(checkpoint)
    if said.method == "gguf":
        return Found(weights)
    notes = consistency_notes(checkpoint, said, weights) if check else ()
    if said.method != "gptq":
        return Found(weights, notes=notes)
    added, about = added_biases(checkpoint, weights)
    return Found(weights, added, (*notes, *about))
