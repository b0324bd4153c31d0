"""Refusing a sweep before it starts: the combinations that cannot be run, and the commands for those that can."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.cli.compose import Request
from jobs.cli.multirun import Composed
from jobs.cli.program import program
from loaders.errors import BadSpec

Combination = Mapping[str, str]
Grid = dict[str, tuple[str, ...]]
SHOWN = 20  # problems that the message lists before it counts the rest


@dataclass(frozen=True)
class Refused:
    """A job that cannot be run. `without` is the key that its scheme does not know, if it could run without that."""

    job: Composed
    problem: str
    without: str | None = None


def refusal(refused: Sequence[Refused], good: Sequence[Composed], request: Request) -> BadSpec:
    """Return the error for a sweep: every combination that cannot be run, and commands to paste for the others."""
    by_problem: dict[str, list[Combination]] = {}
    for each in refused:
        by_problem.setdefault(each.problem, []).append(each.job.varied)
    problems = [
        f"{' '.join(words(grid))}: {problem}" if grid else problem
        for problem, combinations in by_problem.items()
        for grid in grids(combinations)
    ]
    if len(problems) > SHOWN:
        problems = [*problems[:SHOWN], f"and {len(problems) - SHOWN} more"]
    rest: dict[str | None, list[Combination]] = {None: [job.varied for job in good]} if good else {}
    for each in refused:
        if each.without is not None:
            left = {key: value for key, value in each.job.varied.items() if key != each.without}
            rest.setdefault(each.without, []).append(left)
    commands = [command(grid, request, key) for key, kept in rest.items() for grid in grids(kept)]
    makes_sense = f"none of the jobs was started; what makes sense: {' && '.join(commands)}"
    return BadSpec(problems, makes_sense if commands else "")


def grids(combinations: Sequence[Combination]) -> list[Grid]:
    """Cover combinations by few grids that contain exactly them. Combinations with other keys are in other grids."""
    by_keys: dict[tuple[str, ...], list[Combination]] = {}
    for each in combinations:
        known = by_keys.setdefault(tuple(each), [])
        if each not in known:
            known.append(each)
    return [grid for keys, same in by_keys.items() for grid in _grids(same, keys)]


def _grids(combinations: Sequence[Combination], keys: Sequence[str]) -> list[Grid]:
    values = {key: tuple(dict.fromkeys(each[key] for each in combinations)) for key in keys}
    if math.prod(map(len, values.values())) == len(combinations):
        return [values]
    return min((_cut(combinations, keys, key) for key in keys if len(values[key]) > 1), key=len)


def _cut(combinations: Sequence[Combination], keys: Sequence[str], pivot: str) -> list[Grid]:
    """Cut combinations along one key. Values of it that occur with the same other values stay in one grid."""
    others: dict[str, list[Combination]] = {}
    for each in combinations:
        others.setdefault(each[pivot], []).append({key: each[key] for key in keys if key != pivot})
    alike: list[tuple[list[str], list[Combination]]] = []
    for value, rest in others.items():
        same = next((a for a in alike if a[1] == rest), None)
        if same is None:
            alike.append(([value], rest))
        else:
            same[0].append(value)
    left = [key for key in keys if key != pivot]
    found = [({pivot: tuple(vs)}, grid) for vs, rest in alike for grid in _grids(rest, left)]
    return [{key: head[key] if key in head else grid[key] for key in keys} for head, grid in found]


def words(grid: Grid) -> list[str]:
    """Return a grid as overrides."""
    return [f"{key}={','.join(values)}" for key, values in grid.items()]


def command(grid: Grid, request: Request, without: str | None = None) -> str:
    """Return the command line of a grid: the given overrides, except those that vary and the key `without`."""
    keys = {word: word.lstrip("+").partition("=")[0] for word in request.given}
    fixed = [word for word, key in keys.items() if key not in request.swept and key != without]
    many = ["-m"] if any(len(values) > 1 for values in grid.values()) else []
    inherited = ["~hydra.sweeper.params"] if many and any(key not in request.swept for key in grid) else []
    return " ".join([program(), "run", *map(shlex.quote, [*many, *fixed, *inherited, *words(grid)])])
