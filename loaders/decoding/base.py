"""What the decoders of checkpoints have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loaders.errors import BadCheckpoint
from loaders.quantization.scheme import Scheme
from loaders.recipes import Recipe, stored_name
from loaders.specs import TensorSpec, WeightSpec


def decoded(
    by_name: Mapping[str, WeightSpec], spec: TensorSpec, scheme: Scheme, optional: Collection[str] = ()
) -> Recipe:
    """The recipe of a weight whose parts have the names, dtypes and sizes that the scheme would give them; `optional`
    roles may be absent.

    Raises:
        BadCheckpoint: a part is missing, or is not what it should be.
    """
    stored = []
    for role, wanted in scheme.stored(spec).items():
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
    return Recipe(spec.name, spec.dtype, spec.shape, tuple(stored), None, scheme, "", "", None)


def part(by_name: Mapping[str, WeightSpec], weight: str, name: str) -> WeightSpec:
    """A part of a quantized weight.

    Raises:
        BadCheckpoint: it is missing.
    """
    if name not in by_name:
        raise BadCheckpoint(f"{weight}: it is quantized, but {name} is missing; fetch the checkpoint again")
    return by_name[name]
