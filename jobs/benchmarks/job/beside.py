"""`weightmill bench job`: whole commands, compared with copying the same files and with the engines' own tools."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Group
from rich.text import Text

from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.commands import Ran, job_command, ours, run_command
from jobs.benchmarks.job.peers import PEERS, Peer, absence, peer_command, peer_source
from jobs.benchmarks.plain_reads import plain_ways
from jobs.benchmarks.random_llama import given_or_random
from jobs.benchmarks.timing import Case, rotate
from jobs.cli.verb import Said, note
from jobs.report.tables import table
from loaders.backends.machine import usable_cpus
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec, io_errors
from loaders.places import DEMO
from loaders.storage import local
from loaders.storage.hashes import hash_file

COPY = "copy the weight files, and sync"
SAID = """start: until the work begins, imports included; a peer's: its imports
ours is faster: median over median, of this run; of a job: the copying's over its own"""


@dataclass
class Whole(Case):
    """A case that is a whole command: what its runs took besides seconds."""

    is_cold: bool = False
    start_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def add(self, ran: Ran, start_s: float | None) -> float:
        """Keep what a run took; returns its seconds."""
        self.cpu_s.append(ran.cpu_s)
        self.peak_bytes = max(self.peak_bytes, ran.peak_bytes)
        if start_s is not None:
            self.start_s.append(start_s)
        return ran.seconds


def time_job(
    path: str | None, gb: float, quants: Sequence[str], sweep: Sequence[str], peer: str | None,
    llmcompressor: str | None, folder: str | None, repeats: int, *, cold: bool,
) -> Said:  # fmt: skip
    """Time jobs as commands, with their source in the page cache, next to a copy of the files and other tools.

    `cold` adds the same jobs with the source dropped from the page cache, and plain reads of it.

    Raises:
        BadSpec: the peer's command has no {source} or {output}, or the source is not a checkpoint.
    """
    if peer is not None and not ("{source}" in peer and "{output}" in peer):
        raise BadSpec("peer: expected a command with {source} and {output} in it")
    with given_or_random(path, gb, folder) as (work, source), ExitStack() as stack:
        checkpoint = open_checkpoint(source)
        timed = _Timed(source, [source / tag.name for tag in checkpoint.files], work)
        cases: list[Whole] = [timed.copy()]
        for quant in quants:
            cases.append(timed.job([quant]))
            cases += [timed.peer(each, quant, llmcompressor) for each in PEERS.get(quant, ())]
        if len(sweep) > 1:
            cases.append(timed.job(list(sweep)))
        if peer is not None:
            cases.append(timed.given(peer, _name([quants[0]])))
        if cold:
            cases += [timed.job([quant], cold=True) for quant in quants]
            cases += timed.reads(stack)
        note("first jobs on the demo, which compile kernels; they are kept")
        for quant in dict.fromkeys([*quants, *sweep]):
            run_command(job_command(DEMO, [quant], f"output.path={work / 'first'}-{quant}"), ours())
        note(f"timing {len(cases)} cases, {repeats} laps each")
        busy = Busy()
        rotate([*cases], repeats, warm_up=0)
        about = {"source": str(source), "bytes": checkpoint.size, "repeats": repeats, "quants": list(quants)}
        return _said(cases, checkpoint.size, busy, about)


class _Timed:
    """The cases over one source, each of which removes its output."""

    def __init__(self, source: Path, files: Sequence[Path], work: Path) -> None:
        self._source = source
        self._files = files
        self._work = work
        self._output = work / "output"

    def copy(self) -> Whole:
        return self._case(COPY, lambda case: self._copied())

    def job(self, quants: list[str], *, cold: bool = False) -> Whole:
        """Return the case of a job, or of a sweep."""
        name, into = _name(quants), f"output.{'path' if len(quants) == 1 else 'root'}={self._output}"

        def call(case: Whole) -> float:
            ran = run_command(job_command(self._source, quants, into), ours())
            document = json.loads(ran.said)
            work_s = (
                document["run"]["wall_s"] if len(quants) == 1 else sum(read["wall_s"] for read in document["passes"])
            )
            return case.add(ran, ran.seconds - work_s)

        return self._case(f"{name}, cold" if cold else name, call, cold=cold)

    def peer(self, peer: Peer, quant: str, llmcompressor: str | None) -> Whole:
        """Return the case of the engine's own tool for a preset."""
        missing = absence(peer, llmcompressor)
        if missing:
            return Whole(peer.name, None, missing, beside=_name([quant]))

        def call(case: Whole) -> float:
            source = peer_source(peer, self._source, self._work)
            if source != self._source:
                self._prepare(sorted(source.rglob("*.*")), cold=False)
            ran = run_command(peer_command(peer, source, self._output, llmcompressor))
            return case.add(ran, json.loads(ran.said.strip().splitlines()[-1])["import_s"])

        return self._case(peer.name, call, beside=_name([quant]))

    def given(self, command: str, beside: str) -> Whole:
        """Return the case of a command that the user gave."""
        parts = [part.replace("{source}", str(self._source)) for part in shlex.split(command)]
        parts = [part.replace("{output}", str(self._output)) for part in parts]
        return self._case(f"peer: {command}", lambda case: case.add(run_command(parts, ours()), None), beside=beside)

    def reads(self, stack: ExitStack) -> list[Whole]:
        """Return the cases of plain reads that find nothing in the page cache."""
        threads = usable_cpus()
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        ways = plain_ways(self._files, pool, threads)

        def timed(way: Callable[[], int]) -> Callable[[Whole], float]:
            def call(case: Whole) -> float:
                began = perf_counter()
                way()
                return perf_counter() - began

            return call

        return [self._case(f"{name}, cold", timed(way), cold=True) for name, way in ways.items()]

    def _case(self, name: str, call: Callable[[Whole], float], *, cold: bool = False, beside: str = "") -> Whole:
        case = Whole(name, None, beside=beside, is_cold=cold)

        def run() -> float:
            self._prepare(self._files, cold=cold)
            try:
                return call(case)
            finally:
                shutil.rmtree(self._output, ignore_errors=True)

        case.call = run
        return case

    def _prepare(self, files: Sequence[Path], *, cold: bool) -> None:
        """Bring files into the page cache, or drop them; nothing of an earlier case is left to be written out."""
        # Dirty pages cannot be dropped, and writing them out must not count for this case.
        os.sync()
        for file in files:
            if cold:
                local.drop_cached(file)
            else:
                hash_file(file)

    def _copied(self) -> float:
        began = perf_counter()
        self._output.mkdir()
        for file in self._files:
            with io_errors("copying", file):
                shutil.copyfile(file, self._output / file.name)
                with (self._output / file.name).open("rb+") as copy:
                    os.fsync(copy.fileno())
        return perf_counter() - began


def _name(quants: Sequence[str]) -> str:
    return f"weightmill {quants[0]}" if len(quants) == 1 else f"weightmill, a sweep: {', '.join(quants)}"


def _said(cases: Sequence[Whole], size: int, busy: Busy, about: Mapping[str, Any]) -> Said:
    taken = busy.document()
    rows = [_row(case, size, cases) for case in cases]
    numbers = ("median s", "GB/s", "ours is faster", "of the best read", "best s", "start s", "CPU s", "peak RSS MB")
    shown = table("case", *numbers, right=numbers)
    for row in (row for row in rows if not row["missing"]):
        shown.add_row(
            row["case"], f"{row['median_s']:.2f}", f"{row['gbps_median']:.3g}",
            _number(row["times_faster"], "{:.2f} x"), _number(row["of_the_best_read"], "{:.0%}"),
            f"{row['best_s']:.2f}", _number(row["start_s"], "{:.2f}"), _number(row["cpu_s"], "{:.2f}"),
            _number(row["peak_bytes"] / 1e6 or None, "{:.0f}"),
        )  # fmt: skip
    missing = [f"{row['case']}: {row['missing']}" for row in rows if row["missing"]]
    here, said = machine(), warning(taken)
    lines = ", ".join(f"{key} {value}" for key, value in about.items())
    text = Group(f"{here}; {lines}", shown, *missing, SAID, *([] if said is None else [Text(said, style="yellow")]))
    return Said({"status": "done", "machine": here, "busy": taken, **about, "rows": rows}, text)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _row(case: Whole, size: int, cases: Sequence[Whole]) -> dict[str, Any]:
    if case.missing or not case.seconds:
        return {"case": case.name, "missing": case.missing or "not run"}
    median = statistics.median(case.seconds)
    by_name = {each.name: statistics.median(each.seconds) for each in cases if each.seconds}
    plain = [by_name[each.name] for each in cases if each.seconds and each.is_cold and not each.cpu_s]
    is_job = bool(case.cpu_s) and not case.beside
    faster = None
    if case.beside in by_name:
        faster = median / by_name[case.beside]
    elif is_job and not case.is_cold and COPY in by_name:
        faster = by_name[COPY] / median
    return {
        "case": case.name, "missing": "", "best_s": min(case.seconds), "median_s": median, "seconds": case.seconds,
        "gbps_best": size / min(case.seconds) / 1e9, "gbps_median": size / median / 1e9, "times_faster": faster,
        "start_s": statistics.median(case.start_s) if case.start_s else None,
        "cpu_s": statistics.median(case.cpu_s) if case.cpu_s else None, "peak_bytes": case.peak_bytes,
        "of_the_best_read": min(plain) / median if plain and is_job and case.is_cold else None,
    }  # fmt: skip
