"""Tasks for several jobs over one source: units that read the same become one task, and every byte is read once.

Jobs of one source have the same units, or one unit for the whole checkpoint where an output is a single file. Such a
one takes the smaller units in, as its steps, so that the big job does not read everything a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from jobs.planning import Unit
from jobs.unit import Share, UnitTask
from loaders.recipes import Recipe
from loaders.strategies import WeightLoader

Content = frozenset[tuple[str, int]]  # the stored tensors that a unit reads, by file and offset


def merge(
    shares: Sequence[tuple[int, Share]],
    root: Path,
    strategy: WeightLoader,
    backend: str,
    threads: int,
    *,
    in_place: bool,
) -> list[UnitTask]:
    """The tasks in which the shares of numbered jobs run; a share is called NUMBER/UNIT."""
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
        unit, steps = _merged([[share.unit for _, share in by_content[c]] for c in members])
        unit = replace(unit, id=_fresh(by_content[host][0][1].unit.id, taken))
        named = {f"{number}/{share.unit.id}": share for number, share in mine}
        tasks.append(UnitTask(unit, root, named, strategy, backend, threads, steps, in_place))
    return tasks


def job_of(share: str) -> int:
    """The number of the job whose share it is."""
    return int(share.split("/", maxsplit=1)[0])


def content_of(unit: Unit) -> Content:
    """What it reads."""
    return frozenset((spec.file, spec.offset) for recipe in unit.recipes for _, spec in recipe.stored)


def _merged(members: Sequence[Sequence[Unit]]) -> tuple[Unit, tuple[tuple[Recipe, ...], ...]]:
    """All units in one: their tensors in the order of the small ones, and what of them belongs to which."""
    known: dict[str, list[Recipe]] = {}
    steps = []
    for units in members:
        step = []
        for recipe in (recipe for unit in units for recipe in unit.recipes):
            same_name = known.setdefault(recipe.name, [])
            if recipe not in same_name:  # copied as stored and decoded, say, are two recipes
                same_name.append(recipe)
                step.append(recipe)
        if step:
            steps.append(tuple(step))
    sources = sorted({tag for units in members for unit in units for tag in unit.sources})
    outputs = members[0][0].outputs if len(members) == 1 and len(members[0]) == 1 else {}
    return Unit("", tuple(sources), tuple(r for step in steps for r in step), outputs), tuple(steps)


def _fresh(name: str, taken: set[str]) -> str:
    """The name, or that with a number: tasks are known by theirs."""
    found = next(n for n in _numbered(name) if n not in taken)
    taken.add(found)
    return found


def _numbered(name: str) -> Iterable[str]:
    yield name
    yield from (f"{name}.{number}" for number in range(2, 1_000_000))
