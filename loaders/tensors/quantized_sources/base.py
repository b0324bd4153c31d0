"""The helpers that the finders of quantized weights share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loaders.architectures.family import load_dtype
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DTYPES, DType, Shape
from loaders.errors import BadCheckpoint
from loaders.quantization.scheme import Decoder, Scheme, stored_specs
from loaders.specs import TensorSpec, WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor, stored_name

# Scales of activations and caches beside a quantized weight, and a flag of bitsandbytes': the engine needs them when it
# runs, and a decoded weight has no use for them. They count as parts of the weight, so that they do not become tensors
# of their own.
RUN_TIME = (
    "input_scale", "input_scale_ub", "activation_scale", "k_scale", "v_scale", "q_scale", "kv_scale", "output_scale",
    "k_bias", "v_bias", "weight_format",
)  # fmt: skip


def decoded(
    by_name: Mapping[str, WeightSpec], spec: TensorSpec, scheme: Scheme, optional: Collection[str] = ()
) -> LogicalTensor:
    """Return the logical tensor of a weight whose parts have the names, dtypes and sizes that the scheme would give.

    The roles in `optional` may be absent.

    Raises:
        BadCheckpoint: a part is missing, or has another dtype or size.
    """
    stored = []
    for role, wanted in stored_specs(scheme, spec.dtype, spec.shape).items():
        if role in optional and stored_name(spec.name, role) not in by_name:
            continue
        found = part(by_name, spec.name, stored_name(spec.name, role))
        is_fitting = found.size <= wanted.size if wanted.is_bound else found.size == wanted.size
        if found.dtype != wanted.dtype or not is_fitting:
            raise BadCheckpoint(
                f"{found.name}: expected {wanted.dtype} {list(wanted.shape)} for {spec.dtype} {list(spec.shape)},"
                f" found {found.dtype} {list(found.shape)}"
            )
        stored.append((role, found))
    return LogicalTensor(
        name=spec.name, dtype=spec.dtype, shape=spec.shape, stored=tuple(stored), window=None, decode=scheme
    )


def part(by_name: Mapping[str, WeightSpec], weight: str, name: str) -> WeightSpec:
    """Return a part of a quantized weight.

    Raises:
        BadCheckpoint: it is missing.
    """
    if name not in by_name:
        raise BadCheckpoint(f"{weight}: it is quantized, but {name} is missing; fetch the checkpoint again")
    return by_name[name]


def undecoded(
    spec: TensorSpec, decoder: Decoder, parts: Mapping[str, WeightSpec], by_name: Mapping[str, WeightSpec]
) -> LogicalTensor:
    """Return the tensor of a weight in a format that is only read, with its scales of RUN_TIME as further parts."""
    module = spec.name.removesuffix("weight")
    beside = {name: by_name[module + name] for name in RUN_TIME if module != spec.name and module + name in by_name}
    return LogicalTensor(
        name=spec.name,
        dtype=spec.dtype,
        shape=spec.shape,
        stored=(*parts.items(), *beside.items()),
        window=None,
        decode=decoder,
    )


def expect(found: WeightSpec, dtypes: tuple[str, ...], shape: Shape, why: str) -> WeightSpec:
    """Return a part if it has one of the dtypes, and the shape; `why` ends the message if it does not.

    Raises:
        BadCheckpoint: it does not.
    """
    if found.dtype.name not in dtypes or found.shape != shape:
        raise BadCheckpoint(
            f"{found.name}: expected {'/'.join(dtypes)} {list(shape)} {why}, found {found.dtype} {list(found.shape)}"
        )
    return found


def quantization_block(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the settings of the checkpoint's quantization, wherever it says them; empty if there are none."""
    return {} if checkpoint.declaration is None else checkpoint.declaration.settings


def float_dtype(checkpoint: Checkpoint) -> DType:
    """Return the dtype to which weights are decoded: the config's, or bfloat16, in which such models are published."""
    return load_dtype(checkpoint.config) or DTYPES["BF16"]
