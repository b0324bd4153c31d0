"""Parts `jobs` and `cores` of `weightmill bench gpu`: whole jobs by each backend, and one on more and more cores.

A job is a command of its own, timed from start to end, with its source in the page cache. Its `work_s` is the time from
its plan to its end, without starting Python and loading compiled kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from jobs.benchmarks.commands import on_cores, ours
from jobs.benchmarks.gpu.bytes import FIRST, device_presets
from jobs.benchmarks.gpu.trials import Bench, Found, Trial
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import WeightmillError
from loaders.places import ROOT
from loaders.presets.catalog import preset
from loaders.storage.base import OUR_PAGE, OUR_REPORT
from loaders.storage.hashes import hash_file
from loaders.strategies.base import cached_share

LONGEST_JOB_S = 120.0  # seconds after which a job is stopped, so that one that hangs does not use up the machine
CACHED = 0.99  # the share of the source in the page cache from which on it is not read first
SLOW = "hqq4"  # a preset whose encoder takes ten times as long
SLOW_STEPS = (1, 4, 16)  # cores on which the slow preset runs: fewer steps, since each takes long
WARM_UP = "first jobs, which compile kernels"


@dataclass(frozen=True)
class Ran:
    """A finished job: seconds of the whole command and of its work, and the hash of each file of its output."""

    seconds: float
    work_s: float
    hashes: dict[str, str]


def whole_jobs(bench: Bench) -> Iterator[Trial]:
    """Run a preset of each kind that the device encodes, on the CPU and on the device, and compare the files."""
    backends, made = ("cpu", bench.device), dict[tuple[str, str], Ran]()

    def call(quant: str, backend: str) -> Found:
        ran = made[quant, backend] = run_job(bench.source, bench, quant, backend)
        found = _timed(ran, bench.source)
        first = made.get((quant, "cpu"))
        if backend == "cpu" or first is None:
            return found
        said = f"{found.said}, {ran.seconds / first.seconds:.2f} times the CPU's"
        differing = sorted(name for name in first.hashes | ran.hashes if first.hashes.get(name) != ran.hashes.get(name))
        if differing:
            return Found(found.numbers, said, f"files differ from the CPU's: {', '.join(differing)}")
        return Found(found.numbers, f"{said}, all {len(ran.hashes)} files the same")

    yield Trial(WARM_UP, partial(_warmed_up, bench))
    for quant in _one_of_a_kind():
        for backend in dict.fromkeys(backends):
            yield Trial(f"{quant}, backend={backend}", partial(call, quant, backend))


def ladder(bench: Bench) -> Iterator[Trial]:
    """Run one job on 1, 2, 4, ... cores, compared with that multiple of one core's rate; and a slow one on a few."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    steps = [1 << power for power in range(len(cores).bit_length()) if 1 << power <= len(cores)]
    rates: dict[tuple[str, int], float] = {}

    def call(quant: str, count: int) -> Found:
        source = bench.source if quant == FIRST else bench.small
        with on_cores(cores[:count]):
            found = _timed(run_job(source, bench, quant, "cpu"), source)
        mine = rates[quant, count] = found.numbers["work_gbps"]
        if count == 1 or (quant, 1) not in rates:
            return found
        ideal = count * rates[quant, 1]
        numbers = {**found.numbers, "cores": count, "ideal_gbps": ideal}
        return Found(numbers, f"{found.said}, {mine / ideal:.0%} of {count} times one core's")

    if "jobs" not in bench.parts:
        yield Trial(WARM_UP, partial(_warmed_up, bench))
    for quant in (FIRST, SLOW):
        for count in steps if quant == FIRST else (step for step in SLOW_STEPS if step in steps):
            yield Trial(f"{quant} on {count} core{'s' if count > 1 else ''}", partial(call, quant, count))


def run_job(source: Path, bench: Bench, quant: str, backend: str) -> Ran:
    """Run a job as a command, and remove its output.

    Raises:
        WeightmillError: the job failed; the message is its last line.
    """
    checkpoint = open_checkpoint(source)
    if (cached_share(checkpoint.source, checkpoint.files) or 0.0) < CACHED:
        for entry in checkpoint.files:
            # This brings the file into the page cache.
            hash_file(source / entry.name)
    output = bench.work / "output"
    given = (f"model.path={source}", f"quant={quant}", f"backend={backend}", f"output.path={output}")
    fixed = ("tracking=none", "cluster=local", "format=json")
    try:
        began = perf_counter()
        ran = subprocess.run(
            [sys.executable, "-m", "jobs.run", *given, *fixed], capture_output=True, text=True, check=False,
            env={**os.environ, **ours()}, timeout=LONGEST_JOB_S,
        )  # fmt: skip
        took = perf_counter() - began
        if ran.returncode:
            lines = ran.stderr.strip().splitlines() or ["no message"]
            raise WeightmillError(f"exit status {ran.returncode}: {lines[-1]}")
        document: dict[str, Any] = json.loads(ran.stdout)
        hashes = {str(path.relative_to(output)): hash_file(path) for path in output.rglob("*") if path.is_file()}
        # The report has times and paths, which differ from run to run; the page has errors, in whose last digits
        # backends may differ.
        del hashes[OUR_REPORT], hashes[OUR_PAGE]
        return Ran(took, float(document["run"]["wall_s"]), hashes)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _timed(ran: Ran, source: Path) -> Found:
    size = open_checkpoint(source).size
    numbers = {"seconds": ran.seconds, "gbps": size / ran.seconds / 1e9, "work_s": ran.work_s,
               "work_gbps": size / ran.work_s / 1e9}  # fmt: skip
    return Found(numbers, f"work {ran.work_s:.2f} s, {numbers['work_gbps']:.3g} GB/s")


def _warmed_up(bench: Bench) -> Found:
    """Compile the kernels by jobs on the demo, which needs the same ones as any bfloat16 source. They are cached."""
    began = perf_counter()
    presets = (*_one_of_a_kind(), SLOW)
    for quant in presets:
        run_job(ROOT / "jobs" / "demo", bench, quant, "cpu")
    return Found({"seconds": perf_counter() - began}, f"{len(presets)} jobs on the demo")


def _one_of_a_kind() -> list[str]:
    """Return one preset of each kind. NF4 and FP4 run the same code, so a whole job of one of them is enough."""
    first: dict[str, str] = {}
    for name in device_presets():
        first.setdefault(preset(name).scheme.kind, name)
    return list(first.values())
