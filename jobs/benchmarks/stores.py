"""`weightmill bench stores`: a job whose source comes by HTTP at a limited rate, beside plain reads of the same
ranges; and what planning a checkpoint of hundreds of gigabytes fetches of it.
"""

from __future__ import annotations

import http.client
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from rich.console import Group
from rich.text import Text

from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.commands import job_command, ours, run_command
from jobs.benchmarks.planning import make_headers
from jobs.benchmarks.random_llama import given_or_random
from jobs.benchmarks.range_server import Served, serving
from jobs.cli.verb import Said, note
from jobs.report.tables import size, table
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import StorageError

RANGE = 16 << 20  # bytes of a request of the plain reads
CONNECTIONS = 8
HEADERS = 97_800  # tensors, in 163 files: as many files as DeepSeek V3 has, of 640 GB
RATE_MB_S = 100.0


def time_stores(path: str | None, gb: float, quant: str, rate: float | None, folder: str | None, laps: int) -> Said:
    """Time plain reads of a checkpoint at a rate in MB/s (None: 100) and a job that reads it so, in turn; then a plan.

    Raises:
        StorageError: a command failed.
    """
    busy, rate = Busy(), rate or RATE_MB_S
    plain_s, job_s, run_s = list[float](), list[float](), list[float]()
    bound: set[str] = set()
    with given_or_random(path, gb, folder) as (work, source):
        total = sum(entry.size for entry in open_checkpoint(source).files)
        with serving(source, rate) as served:
            for lap in range(laps):
                plain_s.append(_read(served, source))
                ran = run_command(job_command(served.url, (quant,), f"output.path={work / f'out{lap}'}"), ours())
                run = json.loads(ran.said)["run"]
                job_s.append(ran.seconds)
                run_s.append(run["wall_s"])
                bound.add(run["bound_by"])
        planned = _planned(work)
    rows = [("plain reads", plain_s), ("job", run_s), ("job, with the start of Python", job_s)]
    shown = table("", "median s", "MB/s", "of plain reads", right=("median s", "MB/s", "of plain reads"))
    plain = statistics.median(plain_s)
    for name, seconds in rows:
        median = statistics.median(seconds)
        shown.add_row(name, f"{median:.2f}", f"{total / median / 1e6:.1f}", f"{plain / median:.0%}")
    here, taken = machine(), busy.document()
    said = warning(taken)
    text = Group(
        f"{here}; {quant} of {size(total)} at {rate:g} MB/s; bound by {', '.join(sorted(bound))}",
        shown,
        f"planning {size(planned['source_bytes'])} in {planned['files']} files: {planned['requests']} requests,"
        f" {size(planned['bytes'])}, {planned['seconds']:.1f} s",
        *([] if said is None else [Text(said, style="yellow")]),
    )
    document = {
        "status": "done", "machine": here, "busy": taken, "bytes": total, "rate_mb_s": rate, "plain_s": plain_s,
        "run_s": run_s, "job_s": job_s, "of_plain": plain / statistics.median(run_s), "bound_by": sorted(bound),
        "plan": planned,
    }  # fmt: skip
    return Said(document, text)


def _read(served: Served, source: Path) -> float:
    """Read all weight files in ranges over several connections; returns the seconds."""
    ranges = [
        (entry.name, at, min(at + RANGE, entry.size))
        for entry in open_checkpoint(source).files
        for at in range(0, entry.size, RANGE)
    ]
    began = perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for part in [pool.submit(_get, served.url, ranges[first::CONNECTIONS]) for first in range(CONNECTIONS)]:
            part.result()
    return perf_counter() - began


def _get(url: str, ranges: list[tuple[str, int, int]]) -> None:
    buffer = memoryview(bytearray(RANGE))
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
        for name, start, stop in ranges:
            connection.request("GET", f"/{name}", headers={"Range": f"bytes={start}-{stop - 1}"})
            answer, at = connection.getresponse(), 0
            while at < stop - start and (count := answer.readinto(buffer[at : stop - start])):
                at += count
            if at < stop - start:
                raise StorageError(f"{name}: the benchmark's server sent {at} of {stop - start} bytes")
            answer.read()


def _planned(work: Path) -> dict[str, Any]:
    """Plan a checkpoint of which only headers exist, over HTTP without a limit of the rate."""
    note(f"making the headers of {HEADERS} tensors")
    source = work / "headers"
    make_headers(source, HEADERS, is_fp8=True)
    files = list(source.glob("*.safetensors"))
    with serving(source, None) as served:
        command = job_command(served.url, ("nf4",), f"output.path={work / 'planned'}", verb="plan")
        ran = run_command(command, ours())
        counts = served.counts()
    stored = sum(path.stat().st_size for path in files)
    return {"source_bytes": stored, "files": len(files), "seconds": ran.seconds, **counts}
