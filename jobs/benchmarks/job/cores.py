"""`weightmill bench job cores=[1,2,4]`: one job on more and more cores, beside what it could do.

The ideal is so many times the rate of the fewest cores. Beside it stand a copy of the files by as many threads, and
encoding and measuring alone on as many: the lesser of these two is what the machine has for a job.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Group
from rich.text import Text

from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.commands import job_command, on_cores, ours, run_command
from jobs.benchmarks.random_llama import given_or_random
from jobs.cli.verb import Said, note
from jobs.report.plots import drawn
from jobs.report.tables import table
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec
from loaders.places import DEMO
from loaders.storage.hashes import hash_file

CHUNK = 32 << 20  # bytes that a thread of the parallel copy takes at once
KINDS = ("command", "work", "copy")


def time_cores(
    path: str | None,
    gb: float,
    quants: Sequence[str],
    cores: Sequence[int],
    folder: str | None,
    repeats: int,
    root: Path,
) -> Said:
    """Run each job on `cores` of this machine's cores, as many as there are, and draw the rates in `root`.

    Raises:
        BadSpec: the system has no way to choose cores, or too few.
        StorageError: a job failed.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise BadSpec("cores: only Linux lets a program choose the cores of another")
    usable = sorted(os.sched_getaffinity(0))
    steps = sorted({count for count in cores if 0 < count <= len(usable)})
    if not steps:
        raise BadSpec(f"cores: {len(usable)} are usable here, and none of {list(cores)} is 1 to {len(usable)}")
    with given_or_random(path, gb, folder) as (work, source):
        checkpoint = open_checkpoint(source)
        files = [source / tag.name for tag in checkpoint.files]
        rows: list[dict[str, Any]] = [
            {"quant": quant, "cores": count, "kernels_gbps": [], **{f"{kind}_s": [] for kind in KINDS}}
            for quant in quants
            for count in steps
        ]
        note("first jobs on the demo, which compile kernels; they are kept")
        for quant in quants:
            run_command(job_command(DEMO, [quant], f"output.path={work / 'first'}-{quant}"), ours())
        busy = Busy()
        for lap in range(repeats):
            for row in rows:
                note(f"lap {lap + 1} of {repeats}: {row['quant']} on {row['cores']}")
                with on_cores(usable[: row["cores"]]):
                    _run(row, source, files, work / "output")
    size = checkpoint.size
    for row in rows:
        for kind in KINDS:
            row[f"{kind}_gbps"] = size / statistics.median(row[f"{kind}_s"]) / 1e9
        row["kernels_gbps"] = statistics.median(row["kernels_gbps"])
        first = next(each for each in rows if each["quant"] == row["quant"])
        row["ideal_gbps"] = first["work_gbps"] * row["cores"] / first["cores"]
    plot = drawn(root / f"cores-{source.name}.png", lambda path: draw(rows, path))
    about = {"source": str(source), "bytes": size, "repeats": repeats, "usable_cores": len(usable)}
    return _said(rows, busy.document(), about, plot, [count for count in cores if count > len(usable)])


def _run(row: dict[str, Any], source: Path, files: Sequence[Path], output: Path) -> None:
    """Run a lap of a row: the job; on as many threads, a copy, and encoding and measuring alone."""
    try:
        _prepare(files)
        ran = run_command(job_command(source, [row["quant"]], f"output.path={output}"), ours())
        row["command_s"].append(ran.seconds)
        row["work_s"].append(float(json.loads(ran.said)["run"]["wall_s"]))
        shutil.rmtree(output)
        _prepare(files)
        row["copy_s"].append(copied(files, output, row["cores"]))
        shutil.rmtree(output)
        _prepare(files)
        row["kernels_gbps"].append(_kernels_alone(source, row["quant"], row["cores"], output))
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _kernels_alone(source: Path, quant: str, cores: int, output: Path) -> float:
    """Return the GB/s of encoding and measuring alone, in a process of its own."""
    command = [sys.executable, "-m", "jobs.benchmarks.job.kernels_alone", str(cores), f"model.path={source}"]
    settings = (f"quant={quant}", f"output.path={output}", "tracking=none")
    found = json.loads(run_command([*command, *settings], ours()).said)
    return float(found["bytes"] / found["seconds"] / 1e9)


def _prepare(files: Sequence[Path]) -> None:
    """Bring the source into the page cache, and leave nothing to be written out."""
    os.sync()
    for file in files:
        hash_file(file)


def copied(files: Sequence[Path], output: Path, threads: int) -> float:
    """Copy files on threads, a range after the other, and sync them; returns the seconds."""
    output.mkdir()
    began = perf_counter()
    descriptors = [
        (os.open(file, os.O_RDONLY), os.open(output / file.name, os.O_CREAT | os.O_RDWR, 0o666)) for file in files
    ]
    ranges = [
        (*pair, at, min(CHUNK, file.stat().st_size - at))
        for file, pair in zip(files, descriptors, strict=True)
        for at in range(0, file.stat().st_size, CHUNK)
    ]

    def copy(source: int, target: int, at: int, size: int) -> None:
        while size:
            count = os.copy_file_range(source, target, size, at, at)
            at, size = at + count, size - count

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda each: copy(*each), ranges))
            list(pool.map(lambda pair: os.fsync(pair[1]), descriptors))
    finally:
        for pair in descriptors:
            for descriptor in pair:
                os.close(descriptor)
    return perf_counter() - began


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw GB/s over cores, of work and of whole commands, beside the ideal and the copy, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    quants = list(dict.fromkeys(row["quant"] for row in rows))
    for index, quant in enumerate(quants):
        mine = [row for row in rows if row["quant"] == quant]
        cores, color = [row["cores"] for row in mine], f"C{index}"
        axes.plot(cores, [row["work_gbps"] for row in mine], "o-", color=color, label=f"{quant}, work alone")
        axes.plot(cores, [row["command_gbps"] for row in mine], "s--", color=color, label=f"{quant}, whole command")
        axes.plot(cores, [row["ideal_gbps"] for row in mine], ":", color=color, label=f"{quant}, ideal")
        alone = [row["kernels_gbps"] for row in mine]
        axes.plot(cores, alone, "^-.", color=color, label=f"{quant}, encoding and measuring alone")
    first = [row for row in rows if row["quant"] == quants[0]]
    axes.plot(
        [row["cores"] for row in first],
        [row["copy_gbps"] for row in first],
        "x-",
        color="gray",
        label="a parallel copy",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.set_xticks([row["cores"] for row in first], [str(row["cores"]) for row in first])
    axes.set(xlabel="cores", ylabel="GB/s of the source")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _said(
    rows: Sequence[Mapping[str, Any]], taken: dict[str, Any], about: Mapping[str, Any], plot: Path | None,
    left: Sequence[int],
) -> Said:  # fmt: skip
    rates = ("command GB/s", "work GB/s", "ideal", "of the ideal", "kernels alone", "parallel copy")
    titles = ("cores", "command s", "work s", *rates)
    shown = table("", *titles, keys=2, right=titles)
    for row in rows:
        shown.add_row(
            row["quant"], str(row["cores"]), *(f"{statistics.median(row[f'{kind}_s']):.2f}" for kind in KINDS[:2]),
            *(f"{row[f'{kind}_gbps']:.3g}" for kind in ("command", "work", "ideal")),
            f"{row['work_gbps'] / row['ideal_gbps']:.0%}", f"{row['kernels_gbps']:.3g}", f"{row['copy_gbps']:.3g}",
        )  # fmt: skip
    here, said = machine(), warning(taken)
    lines = ", ".join(f"{key} {value}" for key, value in about.items())
    fewer = [f"not run, since there are not so many cores: {', '.join(map(str, left))}"] if left else []
    drew = [] if plot is None else [f"plot: {plot}"]
    text = Group(f"{here}; {lines}", shown, *fewer, *drew, *([] if said is None else [Text(said, style="yellow")]))
    document = {"status": "done", "machine": here, "busy": taken, **about, "rows": list(rows)}
    return Said({**document, "plot": None if plot is None else str(plot), "not_run": list(left)}, text)
