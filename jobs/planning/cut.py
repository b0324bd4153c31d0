"""Cutting a checkpoint's tensors into units: runs of whole blocks, and parts of blocks that are too large for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from loaders.layouts import Placed
from loaders.specs import StoredTensor
from loaders.tensors.logical_tensor import LogicalTensor

Bonds = Mapping[str, Sequence[str]]  # by tensor: names of what it shares with others
NO_BONDS: Bonds = {}


def cut_units(
    tensors: Sequence[LogicalTensor],
    unit_bytes: float,
    bonds: Bonds = NO_BONDS,
    *,
    share: bool = True,
    in_order: bool = False,
    part_of: Callable[[str], str] = lambda name: "",
) -> list[list[LogicalTensor]]:
    """Cut tensors into runs of at most `unit_bytes` of source, or of a single block or part of one.

    Tensors come sorted by block. A block is cut only if it is larger than that, between tensors that have nothing in
    common: see `_parts`. Without `share`, tensors share nothing, as those of a GGUF, whose order must stay. With
    `in_order`, tensors keep their order, so that a file that all units write does not depend on how they are cut.
    `part_of` says by a tensor's name in which part of a checkpoint it is; no unit has tensors of two.
    """
    units: list[list[LogicalTensor]] = []
    size = 0
    for _, run in groupby(tensors, key=lambda tensor: tensor.block):
        block = list(run)
        is_large = sum(tensor.source_bytes for tensor in block) > unit_bytes
        for part in _parts(block, bonds, share=share, in_order=in_order) if is_large else [block]:
            part_bytes = sum(tensor.source_bytes for tensor in part)
            if not units or size + part_bytes > unit_bytes or part_of(part[0].name) != part_of(units[-1][-1].name):
                units.append([])
                size = 0
            units[-1].extend(part)
            size += part_bytes
    return units


def bonds_of(placed: Iterable[Placed]) -> Bonds:
    """Return what a target's layout puts together: the stack or the file of its own that a tensor is a part of."""
    found: dict[str, list[str]] = {}
    for each in placed:
        for stored in each.stored.values():
            if stored.whole is not None:
                found.setdefault(each.tensor.source_name, []).append(stored.name)
            if stored.place is not None:
                found.setdefault(each.tensor.source_name, []).append(stored.place[0])
    return found


def _parts(block: Sequence[LogicalTensor], bonds: Bonds, *, share: bool, in_order: bool) -> list[list[LogicalTensor]]:
    """Return a block's tensors in the smallest sets that must stay in one unit, in the order of their first ones.

    Together stay the tensors of a module, such as a weight and its scales; those of a fused group, which may share a
    scale and are never in engines apart; and those that a target stacks into one tensor, which one file holds.
    """
    leader = list(range(len(block)))
    first: dict[str, int] = {}
    for index, tensor in enumerate(block):
        for bond in (*_own_bonds(tensor), *bonds.get(tensor.name, ())) if share else ():
            one, other = _leader(leader, first.setdefault(bond, index)), _leader(leader, index)
            leader[max(one, other)] = min(one, other)
    leaders = [_leader(leader, index) for index in range(len(block))]
    if in_order:
        leaders = _without_gaps(leaders)
    parts: dict[int, list[LogicalTensor]] = {}
    for first_of_set, tensor in zip(leaders, block, strict=True):
        parts.setdefault(first_of_set, []).append(tensor)
    return list(parts.values())


def _without_gaps(leaders: Sequence[int]) -> list[int]:
    """Join sets that lie among each other, so that each is a run of neighbours."""
    last = {leader: index for index, leader in enumerate(leaders)}
    joined, end, current = [], -1, 0
    for index, leader in enumerate(leaders):
        if index > end:
            current = index
        end = max(end, last[leader])
        joined.append(current)
    return joined


def _own_bonds(tensor: LogicalTensor) -> Iterator[str]:
    module, _, _ = tensor.name.rpartition(".")
    if module:
        yield module
    if tensor.group is not None:
        yield tensor.group


def _leader(leader: list[int], index: int) -> int:
    """Return the first tensor of the set that a tensor is in, and shorten the way to it for the next time."""
    while leader[index] != index:
        leader[index] = leader[leader[index]]
        index = leader[index]
    return index


def shards(share: Sequence[Placed], max_bytes: int | None) -> Iterator[list[StoredTensor]]:
    """Yield what a unit stores in its usual files, of at most `max_bytes` each if that is given.

    What is stored of one tensor, and the parts of one stack, stay together, even if they alone are more.
    """
    whole: dict[str, list[StoredTensor]] = {}  # by the name of a stack, or of a tensor
    for placed in share:
        usual = [tensor for tensor in placed.stored.values() if tensor.place is None]
        for tensor in usual:
            key = tensor.name if tensor.whole is not None else f"{placed.tensor.name}\n"
            whole.setdefault(key, []).append(tensor)
    part: list[StoredTensor] = []
    size = 0
    for tensors in whole.values():
        more = sum({t.name: (t.whole or t.spec).size for t in tensors}.values())
        if part and max_bytes is not None and size + more > max_bytes:
            yield part
            part, size = [], 0
        part += tensors
        size += more
    if part:
        yield part
