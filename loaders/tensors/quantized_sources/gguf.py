"""A GGUF as a checkpoint of transformers: its names, experts one by one, the rows of q and k in transformers' order."""

from __future__ import annotations

from loaders.architectures.gguf import architecture_of, read_types
from loaders.architectures.gguf_config import FACTORS, faults
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import gguf
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.quantization.read_only.ggml import check_readable
from loaders.quantization.schemes.ggml import Ggml
from loaders.specs import WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor, Window


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
    for spec in checkpoint.weights:
        name = architecture.hf_name(spec.name)
        if spec.name == FACTORS:  # it follows from the rope scaling, which is in the config
            continue
        if name is None:
            raise BadSpec(f"{spec.name}: transformers has no such tensor for {architecture.name}")
        for each, part in _parts(name, spec):
            order = architecture.row_order(each, part.shape[0], checkpoint.config, inverse=True)
            is_block = part.dtype.block > 1
            if is_block:
                check_readable(part.dtype.name)
            found[each] = LogicalTensor(
                name=each,
                dtype=DTYPES["F32"] if is_block else part.dtype,
                shape=part.shape,
                stored=(("weight", part),),
                window=None if is_block else Window.whole(part),
                decode=Ggml(part.dtype.name) if is_block else None,
                role="",
                block="",
                group=None,
                order=order,
            )
    return found


def _parts(name: str, spec: WeightSpec) -> list[tuple[str, WeightSpec]]:
    """Return a tensor, or the experts that are stacked in it, as spans of its bytes."""
    if "{}" not in name:
        return [(name, spec)]
    if len(spec.shape) != 3:
        raise BadCheckpoint(f"{spec.name}: expected stacked experts, found shape {list(spec.shape)}")
    count, *shape = spec.shape
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
