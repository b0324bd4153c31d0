"""`weightmill bench loaders`: every strategy on the user's own storage, cold and warm, compared with plain reads.

Every lap runs every case once, each lap in another order, so that other load of the machine, and what a case leaves to
the next, affects all alike. Every byte is summed, so that a memory map is not credited for bytes that it did not read.
For cold laps, the kernel is asked to drop the files before each case, and the share that stayed is checked. The files
are read once before that: memory that was free for seconds may have gone back to a virtual machine's host, and getting
it back costs more than reading (0.5 instead of 1.0 GB/s, whatever the case).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.busy_machine import Busy, machine
from jobs.benchmarks.plain_reads import CHUNK, MAPPED, plain_ways
from jobs.benchmarks.summing import Summing
from jobs.benchmarks.timing import Case, rotate
from jobs.cli.verb import note
from loaders.backends.machine import usable_cpus
from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.errors import BadSpec
from loaders.places import CONF, ROOT
from loaders.storage import local
from loaders.strategies import LOADERS, AutoLoader, MultiThreadWeightLoader, WeightLoader, loader

SKIPPED = {"low_memory": "rank 0 loads as auto does"}  # strategies that are not timed, with the reason
SETTLED = 4 << 30  # the most bytes of the files that are read before they are dropped
STAYED = 0.05  # the share of a file in the page cache up to which it counts as cold
# A program that loads one weight, in a process of its own: the time to the first byte includes imports.
FIRST_BYTE = (
    "import sys; from loaders.strategies import loader;"
    "name, value = next(loader(sys.argv[1]).iterate_weights(sys.argv[2])); print(int(value.reshape(-1)[0]) >= 0)"
)


@dataclass
class StrategyTimings:
    """The timings of one way of reading: GB/s and CPU seconds of each lap, warm and cold, and other observations."""

    name: str
    is_strategy: bool
    serves_jobs: bool = False
    missing: str = ""
    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: {"warm": [], "cold": []})
    peak_bytes: int = 0
    first_byte_s: float | None = None
    said: dict[str, str] = field(default_factory=dict)  # remarks of the last lap, by "warm" and "cold"
    saying: str = ""

    def row(self) -> dict[str, Any]:
        return {
            "case": self.name,
            "is_strategy": self.is_strategy,
            "serves_jobs": self.serves_jobs,
            "missing": self.missing,
            **{
                f"{kind}_gbps_{how}": _of(getattr(self, kind), how)
                for kind in ("warm", "cold")
                for how in ("best", "median")
            },
            **{f"{kind}_cpu_s": _of(taken, "median") for kind, taken in self.cpu_s.items()},
            "peak_bytes": self.peak_bytes,
            "first_byte_s": self.first_byte_s,
            "said": self.said,
        }


def _of(rates: Sequence[float], how: str) -> float | None:
    return None if not rates else max(rates) if how == "best" else statistics.median(rates)


def measure(path: str, names: Sequence[str], repeats: int, *, cold: bool) -> dict[str, Any]:
    """Time the named strategies, or all, on a checkpoint's folder; returns the document of the benchmark.

    Raises:
        BadSpec: the folder holds no weights, or a strategy is unknown.
    """
    checkpoint = open_checkpoint(path)
    unknown = [name for name in names if name not in LOADERS]
    if unknown:
        raise BadSpec(f"strategies: unknown {unknown[0]!r}; known: {', '.join(LOADERS)}")
    threads, busy = usable_cpus(), Busy()
    folder = checkpoint.folder("bench loaders")
    files = [folder / entry.name for entry in checkpoint.files]
    with ThreadPoolExecutor(threads) as pool:
        size = sum(file.stat().st_size for file in files)
        cases = {name: Sums(way, size) for name, way in plain_ways(files, pool, threads).items()}
        found = {name: StrategyTimings(name, False) for name in cases}
        for name in names or [n for n in LOADERS if n not in SKIPPED]:
            key = f"strategy={name}"
            found[key] = StrategyTimings(key, True, not LOADERS[name]().not_for_jobs)
            cases[key] = _by_strategy(name, checkpoint, pool, threads, found[key])
        stayed = _run(cases, found, files, repeats, cold=cold)
        _check_sums(cases, found)
    _first_bytes(checkpoint, found)
    return {**_document(checkpoint, found, repeats, threads, stayed), "machine": machine(), "busy": busy.document()}


# --- cases


class Sums:
    """A case that returns its seconds, and keeps its sum and its CPU seconds."""

    def __init__(self, call: Callable[[], int], size: int) -> None:
        self._call = call
        self.size = size
        self.sum: int | None = None
        self.cpu_s = 0.0

    def __call__(self) -> float:
        began, cpu = time.perf_counter(), time.process_time()
        self.sum = self._call()
        self.cpu_s = time.process_time() - cpu
        return time.perf_counter() - began


def _by_strategy(
    name: str, checkpoint: Checkpoint, pool: ThreadPoolExecutor, threads: int, seen: StrategyTimings
) -> Sums:
    def call() -> int:
        made: WeightLoader = loader(name)
        summing = Summing(pool, threads)
        for _, value in made.iterate_weights(checkpoint):
            summing.add(_raw(value))
        found = summing.total()
        seen.peak_bytes = max(seen.peak_bytes, made.stats.peak_anonymous_bytes)
        seen.saying = said_by(made)
        return found

    return Sums(call, checkpoint.size)


def said_by(made: WeightLoader) -> str:
    """Return what a loader found while it loaded: the chosen strategy, or the measured number of threads."""
    if isinstance(made, AutoLoader):
        return f"{made.chosen}: {made.why}"
    return made.workers_said if isinstance(made, MultiThreadWeightLoader) else ""


def _raw(value: Any) -> np.ndarray:
    return np.asarray(value).reshape(-1).view(np.uint8)


def _run(
    cases: Mapping[str, Sums], found: Mapping[str, StrategyTimings], files: Sequence[Path], repeats: int, *, cold: bool
) -> float | None:
    """Run warm laps, then cold ones.

    Returns:
        The largest share of a file that stayed in the page cache before a cold lap; None without cold laps.
    """
    stayed: list[float] = []

    def prepared(name: str, kind: str, before: Callable[[], None]) -> Callable[[], float]:
        case, seen = cases[name], found[name]

        def call() -> float:
            before()
            seconds = case()
            seen.cpu_s[kind].append(case.cpu_s)
            if seen.saying:
                seen.said[kind] = seen.saying
            return seconds

        return call

    def drop() -> None:
        _settle(files)
        shares = [local.drop_cached(path) for path in files]
        known = [share for share in shares if share is not None]
        if not known:
            raise BadSpec("the system does not drop files from its page cache")
        stayed.append(max(known))

    for kind, before in (("warm", lambda: None), ("cold", drop)):
        if kind == "cold" and not cold:
            continue
        note(f"{kind}: {len(cases)} ways, {repeats} laps each")
        timed = [Case(name, prepared(name, kind, before)) for name in cases if not found[name].missing]
        rotate(timed, repeats, warm_up=1 if kind == "warm" else 0, shuffled=True)
        for each in timed:
            # Warm-up laps were counted too; they are the first.
            found[each.name].cpu_s[kind][:] = found[each.name].cpu_s[kind][-repeats:]
            found[each.name].missing = found[each.name].missing or each.missing
            getattr(found[each.name], kind).extend(cases[each.name].size / seconds / 1e9 for seconds in each.seconds)
    return max(stayed) if stayed else None


def _settle(files: Sequence[Path]) -> None:
    """Read the files and discard the bytes, so that the page cache holds memory which this machine already has."""
    memory, left = bytearray(CHUNK), SETTLED
    for path in files:
        with path.open("rb", buffering=0) as file:
            while left > 0 and (count := file.readinto(memory)):
                left -= count


def _check_sums(cases: Mapping[str, Sums], found: Mapping[str, StrategyTimings]) -> None:
    """Check that all strategies give one sum, and all reads of whole files another; others have read wrong bytes."""
    for kind in (True, False):
        sums = {
            name: case.sum for name, case in cases.items() if found[name].is_strategy is kind and case.sum is not None
        }
        usual = statistics.mode(sums.values()) if sums else None
        for name, own in sums.items():
            if own != usual:
                found[name].missing = f"its bytes sum to {own:x}, the others' to {usual:x}"


def _first_bytes(checkpoint: Checkpoint, found: Mapping[str, StrategyTimings]) -> None:
    """Measure the seconds from the start of a process to its first weight, for each strategy."""
    for name, each in found.items():
        if each.is_strategy and not each.missing:
            began = time.perf_counter()
            ran = subprocess.run(
                [sys.executable, "-c", FIRST_BYTE, name.removeprefix("strategy="), str(checkpoint.address)],
                capture_output=True, text=True, check=False, cwd=ROOT,
            )  # fmt: skip
            each.first_byte_s = time.perf_counter() - began if ran.returncode == 0 else None


# --- results


def _document(
    checkpoint: Checkpoint, found: Mapping[str, StrategyTimings], repeats: int, threads: int, stayed: float | None
) -> dict[str, Any]:
    is_cold = stayed is not None and stayed <= STAYED
    rows = [each.row() for each in found.values()]
    return {
        "status": "done",
        "path": str(checkpoint.address),
        "container": checkpoint.container,
        "bytes": checkpoint.size,
        "filesystem": local.filesystem(checkpoint.folder("bench loaders")),
        "threads": threads,
        "repeats": repeats,
        "stayed_in_cache": stayed,
        "is_cold": is_cold,
        "rows": rows,
        "ratios": {kind: _ratios(rows, kind) for kind in ("warm", *(("cold",) if is_cold else ()))},
        "spread": {kind: _spread(found, rows, kind) for kind in ("warm", *(("cold",) if is_cold else ()))},
        "winners": {kind: _winner(rows, kind) for kind in ("warm", *(("cold",) if is_cold else ()))},
    }


def _ratios(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    """Return the ratio of each strategy's median rate to the yardstick's.

    The yardstick is, for warm laps, summing the mapped files in place; for cold laps, the fastest plain read.
    """
    key, yardstick = f"{kind}_gbps_median", _yardstick(rows, kind)
    if yardstick is None:
        return {}
    return {r["case"]: r[key] / yardstick[key] for r in rows if r["is_strategy"] and r[key] and not r["missing"]}


def _yardstick(rows: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    key = f"{kind}_gbps_median"
    plain = [r for r in rows if not r["is_strategy"] and r[key] and (kind == "cold" or r["case"] == MAPPED)]
    return max(plain, key=lambda row: float(row[key]), default=None)


def _spread(
    found: Mapping[str, StrategyTimings], rows: Sequence[Mapping[str, Any]], kind: str
) -> dict[str, list[float]]:
    """Return each strategy's ratios to the yardstick in the single laps, sorted."""
    yardstick = _yardstick(rows, kind)
    if yardstick is None:
        return {}
    laps = getattr(found[yardstick["case"]], kind)
    return {
        name: sorted(own / other for own, other in zip(getattr(each, kind), laps, strict=True))
        for name, each in found.items()
        if each.is_strategy and not each.missing and len(getattr(each, kind)) == len(laps)
    }


def _winner(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, str]:
    """Return the names of the fastest strategy, and of the fastest one that serves jobs."""
    key = f"{kind}_gbps_median"
    fit = [r for r in rows if r["is_strategy"] and r[key] and not r["missing"] and r["case"] != "strategy=auto"]
    found = {}
    for use, mine in (("loading", fit), ("jobs", [r for r in fit if r["serves_jobs"]])):
        if mine:
            best = max(mine, key=lambda r: float(r[key]))
            found[use] = best["case"].removeprefix("strategy=")
    return found


def yaml_line(name: str) -> str:
    """Return a strategy with its settings as a line of YAML for a job's config."""
    import yaml

    values = yaml.safe_load((CONF / "strategy" / f"{name}.yaml").read_text())
    return f"strategy: {yaml.safe_dump(values, default_flow_style=True, width=1000, sort_keys=False).strip()}"
