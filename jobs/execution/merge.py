"""Merging the units of several jobs over one source into tasks, so that every byte is read once.

Jobs of one source have the same units, which are merged. Units of an expanded model are cut at other places, because
of its new blocks; a unit whose tensors are a subset of another's joins that unit's task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from jobs.execution.unit import Share, UnitTask
from jobs.planning.plan import Unit
from loaders.storage.address import Address
from loaders.strategies import WeightLoader
from loaders.tensors.logical_tensor import LogicalTensor

# The stored tensors that a unit reads, by file and offset. Of a stack of which it reads some experts only, also the
# first that it reads: units with other experts of the same stack are other work.
Content = frozenset[tuple[str, int, int | None]]


def merge(
    shares: Sequence[tuple[int, Share]],
    source: Address,
    strategy: WeightLoader,
    threads: int,
    *,
    in_place: bool,
) -> list[UnitTask]:
    """Merge the shares of numbered jobs into tasks. A share's name in its task is NUMBER/UNIT."""
    by_content: dict[Content, list[tuple[int, Share]]] = {}
    for number, share in shares:
        by_content.setdefault(content_of(share.unit), []).append((number, share))
    hosts: dict[Content, list[Content]] = {}
    for content in sorted(by_content, key=len, reverse=True):
        host = next((h for h in hosts if content < h), content)
        hosts.setdefault(host, []).append(content)
    tasks, taken = [], set[str]()
    for host in sorted(hosts, key=lambda h: by_content[h][0][1].unit.id):
        members = sorted(hosts[host], key=lambda c: (c == host, by_content[c][0][1].unit.id))
        mine = [each for content in members for each in by_content[content]]
        unit = _merged([share.unit for _, share in mine], _fresh(by_content[host][0][1].unit.id, taken))
        named = {f"{number}/{share.unit.id}": share for number, share in mine}
        tasks.append(
            UnitTask(
                unit=unit,
                source=source,
                shares=named,
                strategy=strategy,
                threads=threads,
                in_place=in_place,
            )
        )
    return tasks


def job_of(share: str) -> int:
    """Return the number of the job that a share belongs to, from its name."""
    return int(share.split("/", maxsplit=1)[0])


def content_of(unit: Unit) -> Content:
    """Return the stored tensors that a unit reads."""
    parts: dict[tuple[str, int], list[LogicalTensor]] = {}
    for tensor in unit.tensors:
        for _, spec in tensor.stored:
            parts.setdefault((spec.file, spec.offset), []).append(tensor)
    return frozenset((file, offset, _first_part(tensors)) for (file, offset), tensors in parts.items())


def _first_part(tensors: Sequence[LogicalTensor]) -> int | None:
    """Return where the first of some parts of a stored tensor begins; None if together they are all of it."""
    cut = [tensor for tensor in tensors if tensor.whole is not None and tensor.window is not None]
    whole = math.prod(cut[0].whole or ()) if cut else 0
    if len(cut) < len(tensors) or sum(math.prod(tensor.shape) for tensor in cut) >= whole:
        return None
    return min(tensor.window.offset for tensor in cut if tensor.window is not None)


def _merged(units: Sequence[Unit], name: str) -> Unit:
    """Merge units into one, with the tensors of all, each once."""
    known: dict[str, list[LogicalTensor]] = {}
    for tensor in (tensor for unit in units for tensor in unit.tensors):
        same_name = known.setdefault(tensor.name, [])
        # One job may copy a tensor as it is stored, and another decode it.
        if tensor not in same_name:
            same_name.append(tensor)
    sources = sorted({tag for unit in units for tag in unit.sources})
    outputs = units[0].outputs if len(units) == 1 else {}
    return Unit(name, tuple(sources), tuple(tensor for same in known.values() for tensor in same), outputs)


def _fresh(name: str, taken: set[str]) -> str:
    """Return a name that no other task has: the given one, or one with a number added."""
    found = next(n for n in _numbered(name) if n not in taken)
    taken.add(found)
    return found


def _numbered(name: str) -> Iterable[str]:
    yield name
    yield from (f"{name}.{number}" for number in range(2, 1_000_000))
