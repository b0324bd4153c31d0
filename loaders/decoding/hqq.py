"""HQQ's modules: W_q with scale, zero and what hqq says of them, in safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.decoding.base import decoded, part
from loaders.errors import BadCheckpoint
from loaders.quantization.hqq import BITS, Hqq
from loaders.recipes import Recipe
from loaders.specs import TensorSpec, WeightSpec, dtype_named
from loaders.strategies import loader

PACKED = ".W_q"
LONGEST = 64  # bytes of a fact


def find(checkpoint: Checkpoint) -> dict[str, Recipe]:
    """The quantized weights, by name."""
    by_name = {spec.name: spec for spec in checkpoint.weights}
    modules = (name.removesuffix(PACKED) for name in by_name if name.endswith(PACKED))
    return {f"{module}.weight": _recipe(checkpoint.root, by_name, module) for module in modules}


def _recipe(root: Path, by_name: Mapping[str, WeightSpec], module: str) -> Recipe:
    name = f"{module}.weight"
    facts = {
        fact: part(by_name, name, f"{module}.{fact}")
        for fact in ("nbits", "group_size", "axis", "shape", "compute_dtype")
    }
    with loader("read").open(root, list(facts.values())) as reader:
        raw = {fact: reader.read(spec, 0, min(spec.size, LONGEST)).tobytes() for fact, spec in facts.items()}
    bits, group_size, axis = (
        int.from_bytes(raw[fact], "little", signed=True) for fact in ("nbits", "group_size", "axis")
    )
    shape = tuple(
        int.from_bytes(raw["shape"][at : at + 8], "little", signed=True) for at in range(0, len(raw["shape"]), 8)
    )
    scale = part(by_name, name, f"{module}.scale")
    known: Any = bits in BITS and axis in (0, 1) and group_size > 0 and len(shape) == 2 and min(shape) > 0
    if not known:
        raise BadCheckpoint(
            f"{name}: {bits} bits, groups of {group_size}, axis {axis}, shape {list(shape)}: none of hqq's formats that"
            f" are read here ({', '.join(map(str, BITS))} bits, axis 0 or 1)"
        )
    dtype = dtype_named(raw["compute_dtype"].decode("ascii", "replace"))
    spec = TensorSpec(name, dtype, shape)
    scheme = Hqq(bits, group_size, axis, None if dtype == scale.dtype else scale.dtype.name)  # type: ignore[arg-type]
    refusal = scheme.refuses(spec)
    if refusal:
        raise BadCheckpoint(f"{name}: {refusal}")
    return decoded(by_name, spec, scheme)
