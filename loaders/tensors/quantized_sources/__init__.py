"""Checkpoints that are already quantized: which weights are, and what decodes each. One file per format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loaders.architectures.mlx import model_of
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.quantized_by import MODELOPT
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources import (
    auto_round,
    awq_gptq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fp8,
    fp8_scaled,
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
    "mxfp8": fp8.find,
    "compressed-tensors": compressed_tensors.find,
    "mlx": mlx.find,
    "mxfp4": mxfp4.find,
    **dict.fromkeys(MODELOPT, modelopt.find),
    "awq": awq_gptq.find_awq,
    "gptq": awq_gptq.find_gptq,
    "auto-round": auto_round.find,
    "fbgemm_fp8": fp8_scaled.find_fbgemm,
    "gguf": gguf.find,
}


# Methods of which checkpoints are common, with why their codes are not turned into weights here.
NOT_DECODED = {
    "aqlm": "its codes are indexes into codebooks that are added up",
    "vptq": "its codes are indexes of vectors in codebooks",
    "exl2": "its codes have several widths in one matrix, in an order of ExLlamaV2's kernels",
    "exl3": "its codes are walks through a trellis, over rotated weights",
    "higgs": "its codes are points of grids, over rotated weights; transformers' model.dequantize() gives them back",
    "spqr": "its outliers are stored apart, in an order of its kernels",
    "quark": "AMD Quark writes many forms under this name",
    "torchao": "its tensors are objects of torchao's classes, which differ between its versions",
    "quanto": "its tensors are objects of quanto's classes",
    "eetq": "its int8 codes lie in an order of its kernels",
    "fp_quant": "its weights are rotated",
    "sinq": "its scales are of both rows and columns",
}
ADD_BIASES = ("gptq", "auto-round")  # whose tools gave every quantized layer a bias; AutoRound while it used AutoGPTQ's


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
        why = f" ({NOT_DECODED[said.method]})" if said.method in NOT_DECODED else ""
        raise BadSpec(
            f"{setting('checkpoint')}: the checkpoint is already quantized ({said.method}), which is not decoded here"
            f"{why}; {as_stored}; take the model as its makers published it, or in a format that is decoded:"
            f" {', '.join(sorted(FINDERS))}"
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
    if said.method not in ADD_BIASES:
        return Found(weights, notes=notes)
    added, about = added_biases(checkpoint, weights)
    return Found(weights, added, (*notes, *about))
