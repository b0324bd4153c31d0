"""Tensors of a GGUF made of several: stacks of experts, and tensors whose rows are those of several sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loaders.architectures.gguf import GgufName
from loaders.errors import BadSpec
from loaders.specs import StoredSpec
from loaders.tensors.encoding import Encoding


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of several parts. `starts` are the bytes before each part of an expert, and after the last one."""

    spec: StoredSpec
    starts: tuple[int, ...]

    def offset(self, name: GgufName) -> int:
        """Return the byte at which a part begins."""
        return (name.expert or 0) * self.starts[-1] + self.starts[name.part]


def is_part(name: GgufName) -> bool:
    return name.expert is not None or name.parts > 1


def wholes(encodings: Sequence[tuple[GgufName, Encoding]], experts: int) -> dict[str, Whole]:
    """Return what the parts make, by name.

    Raises:
        BadSpec: a part or an expert is missing, or they differ in shape or type.
    """
    found: dict[str, dict[tuple[int | None, int], tuple[GgufName, StoredSpec]]] = {}
    for name, encoding in encodings:
        [part] = encoding.stored.values()
        found.setdefault(name.name, {})[name.expert, name.part] = name, part
    return {name: _whole(name, [each for _, each in sorted(parts.items())], experts) for name, parts in found.items()}


def _whole(name: str, parts: Sequence[tuple[GgufName, StoredSpec]], experts: int) -> Whole:
    first = parts[0][0]
    is_stack = first.expert is not None
    numbers = range(experts) if is_stack else (None,)
    if [(each.expert, each.part) for each, _ in parts] != [(n, part) for n in numbers for part in range(first.parts)]:
        if is_stack:
            present = len({each.expert for each, _ in parts})
            raise BadSpec(f"{name}: {present} experts to stack, config.json says {experts}")
        raise BadSpec(f"{name}: {len(parts)} of the {first.parts} tensors that it is made of")
    kinds = [{(spec.dtype, spec.shape) for each, spec in parts if each.part == part} for part in range(first.parts)]
    one = [next(iter(kind)) for kind in kinds]
    if any(len(kind) > 1 for kind in kinds) or len({(dtype, shape[1:]) for dtype, shape in one}) > 1:
        said = sorted({f"{spec.dtype.name} {list(spec.shape)}" for _, spec in parts})
        raise BadSpec(f"{name}: its parts differ in shape or type ({', '.join(said)}); a tensor has one of each")
    dtype, shape = one[0]
    starts = [0]
    for _, each in one:
        starts.append(starts[-1] + dtype.size(each))
    rows = (sum(each[0] for _, each in one), *shape[1:])
    return Whole(StoredSpec(dtype, (experts, *rows) if is_stack else rows), tuple(starts))
