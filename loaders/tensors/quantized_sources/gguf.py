"""A GGUF as a checkpoint of transformers: its names, experts one by one, the rows of q and k in transformers' order.

Beside `X.weight` there may be `X.scale`, by which the engine multiplies (NVFP4), and `X.input_scale`, for activations:
a float32, or one for each expert of a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loaders.architectures.gguf import architecture_of, read_types
from loaders.architectures.gguf_config import FACTORS, faults
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import gguf
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.limits import check_tensors
from loaders.quantization.read_only.ggml import GgmlScaled, check_readable
from loaders.quantization.schemes.ggml import Ggml
from loaders.specs import RowOrder, WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor, Window

SCALES = ("scale", "input_scale")


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find every tensor under its name in transformers; blocks are decoded to float32.

    Raises:
        BadSpec: the architecture is not known, or it has a tensor or a setting that transformers' class has not.
    """
    if not checkpoint.config:
        known = ", ".join(read_types())
        raise BadSpec(
            f"{setting('checkpoint')}: {checkpoint.address} is a GGUF of an architecture that is not known here:"
            f" {known} are"
        )
    metadata = gguf.plain(gguf.read_metadata(checkpoint.source, checkpoint.files[0].name))
    wrong = faults(metadata, [spec.name for spec in checkpoint.weights])
    if wrong:
        raise BadSpec(
            f"{setting('checkpoint')}: transformers' {checkpoint.config['model_type']} has no place for what the GGUF"
            f" says: {'; '.join(wrong)}; keep it a GGUF (a quant of gguf_*), or take the original model"
        )
    architecture, found = architecture_of(checkpoint.config), {}
    by_name = {spec.name: spec for spec in checkpoint.weights}
    for spec in checkpoint.weights:
        if spec.name == FACTORS:  # it follows from the rope scaling, which is in the config
            continue
        if not spec.shape:
            raise BadCheckpoint(f"{spec.name}: a single number, expected a vector, a matrix or a stack; fetch it again")
        module, _, end = spec.name.rpartition(".")
        if end in SCALES and f"{module}.weight" in by_name:
            continue
        name = architecture.hf_name(spec.name)
        if name is None:
            raise BadSpec(f"{spec.name}: transformers has no such tensor for {architecture.name}")
        for index, (each, part) in enumerate(_parts(name, spec)):
            order = architecture.row_order(each, part.shape[0], checkpoint.config, inverse=True)
            found[each] = _tensor(each, part, _scales(by_name, spec, "{}" in name, index), order)
    return found


def _tensor(name: str, part: WeightSpec, scales: Mapping[str, WeightSpec], order: RowOrder | None) -> LogicalTensor:
    is_block = part.dtype.block > 1
    if is_block:
        check_readable(part.dtype.name)
    elif scales:
        beside = next(iter(scales.values())).name
        raise BadSpec(f"{part.name}: {part.dtype} weights with a {beside} are not read; blocks of codes are")
    decoder = GgmlScaled(part.dtype.name) if "scale" in scales else Ggml(part.dtype.name)
    return LogicalTensor(
        name=name,
        dtype=DTYPES["F32"] if is_block else part.dtype,
        shape=part.shape,
        stored=(("weight", part), *scales.items()),
        window=None if is_block else Window.whole(part),
        decode=decoder if is_block else None,
        role="",
        block="",
        group=None,
        order=order,
    )


def _scales(by_name: Mapping[str, WeightSpec], weight: WeightSpec, is_stack: bool, index: int) -> dict[str, WeightSpec]:
    """Return the scales of a weight, or of expert `index` of a stack.

    Raises:
        BadCheckpoint: they have another dtype or shape.
    """
    found = {}
    for end in SCALES if weight.name.endswith(".weight") else ():
        spec = by_name.get(weight.name.removesuffix("weight") + end)
        if spec is None:
            continue
        wanted = weight.shape[:1] if is_stack else (1,)
        if spec.dtype.name != "F32" or spec.shape != wanted:
            raise BadCheckpoint(
                f"{spec.name}: expected F32 {list(wanted)} for {weight.name}, found {spec.dtype} {list(spec.shape)}"
            )
        found[end] = replace(spec, shape=(1,), offset=spec.offset + 4 * index, size=4)
    return found


def _parts(name: str, spec: WeightSpec) -> list[tuple[str, WeightSpec]]:
    """Return a tensor, or the experts that are stacked in it, as spans of its bytes."""
    if "{}" not in name:
        return [(name, spec)]
    if len(spec.shape) != 3:
        raise BadCheckpoint(f"{spec.name}: expected stacked experts, found shape {list(spec.shape)}")
    count, *shape = spec.shape
    check_tensors(count, spec.name)
    size = spec.size // max(1, count)
    return [
        (
            name.format(expert),
            WeightSpec(
                name=spec.name,
                dtype=spec.dtype,
                shape=tuple(shape),
                file=spec.file,
                offset=spec.offset + expert * size,
                size=size,
            ),
        )
        for expert in range(count)
    ]
