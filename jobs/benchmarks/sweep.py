"""`weightmill bench sweep`: a sweep compared with its jobs run one by one.

The source is dropped from the page cache before each case, so that every byte comes from the disk again. With a rate,
the disk is slow, so that reading takes most of the time. Each case is a process of its own, because the kernel counts
fetched bytes by process. The outputs of both ways are compared by their files' hashes.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group

from jobs.benchmarks.commands import job_command, ours, run_command
from jobs.benchmarks.disk_limit import limited_reads
from jobs.benchmarks.random_llama import given_or_random
from jobs.cli.verb import Said, note
from jobs.report import tables
from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.errors import BadSpec, StorageError
from loaders.storage import local
from loaders.storage.base import OUR_REPORT
from loaders.storage.hashes import hash_file

STAYED = 0.05  # the share of a file in the page cache up to which it counts as cold


@dataclass
class Timed:
    """A command of this benchmark: the times of its laps, and the hashes of its files, by output and file."""

    name: str
    quants: tuple[str, ...]
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    fetched: list[int] = field(default_factory=list)  # bytes that the kernel fetched from disks, by lap
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)


def time_sweep(
    path: str | None, gb: float, quants: Sequence[str], rate: float | None, folder: str | None, repeats: int
) -> Said:
    """Time a sweep of `quants` and each of them alone, with reads from the disk limited to `rate` MB/s.

    Raises:
        BadSpec: the folder holds no weights, there are fewer than two quants, or reads cannot be limited.
        StorageError: a job failed.
    """
    if len(set(quants)) < 2:
        raise BadSpec("quants: a sweep is of two or more, such as [nf4,mlx_int4]")
    with given_or_random(path, gb, folder) as (work, source):
        checkpoint = open_checkpoint(source)
        files = [source / tag.name for tag in checkpoint.files]
        cases = [Timed("the sweep", tuple(quants)), *(Timed(quant, (quant,)) for quant in quants)]
        limit: AbstractContextManager[list[str]] = (
            nullcontext([]) if rate is None else limited_reads(source, int(rate * 1e6))
        )
        with limit as within:
            for lap in range(repeats):
                for case in cases:
                    note(f"lap {lap + 1} of {repeats}: {case.name}")
                    _run(case, source, files, work / "outputs", within)
    return _said(cases, checkpoint, rate, repeats)


def _run(case: Timed, source: Path, files: Sequence[Path], root: Path, within: Sequence[str]) -> None:
    """Run one lap of a case, over a source that is not in the page cache."""
    # Dirty pages cannot be dropped, and writing out the last case's files must not count for this one.
    os.sync()
    stayed = max((local.drop_cached(file) or 0.0 for file in files), default=0.0)
    if stayed > STAYED:
        note(f"{stayed:.0%} of a file of the source stayed in the page cache: another process has it mapped, perhaps")
    try:
        ran = run_command([*within, *job_command(source, case.quants, f"output.root={root}")], ours())
    except StorageError as error:
        raise StorageError(f"{case.name}: {error}") from error
    case.seconds.append(ran.seconds)
    case.cpu_s.append(ran.cpu_s)
    case.fetched.append(ran.fetched_bytes)
    case.hashes = {output.name: _hashes(output) for output in sorted(root.iterdir()) if (output / OUR_REPORT).exists()}
    shutil.rmtree(root)


def _hashes(output: Path) -> dict[str, str]:
    """Return the hashes of an output's files, without the report, which has times and paths."""
    names = (path.relative_to(output) for path in sorted(output.rglob("*")) if path.is_file())
    return {str(name): hash_file(output / name) for name in names if str(name) != OUR_REPORT}


def _said(cases: Sequence[Timed], checkpoint: Checkpoint, rate: float | None, repeats: int) -> Said:
    together, *alone = cases
    singles = {name: files for case in alone for name, files in case.hashes.items()}
    rows = [_row(case, checkpoint.size) for case in cases]
    slowest = max(row["median_s"] for row in rows[1:])
    found: dict[str, Any] = {
        "to_the_slowest": rows[0]["median_s"] / slowest,
        "to_all": rows[0]["median_s"] / sum(row["median_s"] for row in rows[1:]),
        "is_same": together.hashes == singles,
    }
    numbers = ("best s", "median s", "CPU s", "from the disk", "of the source")
    shown = tables.table("case", *numbers, right=numbers)
    for row in rows:
        shown.add_row(
            row["case"], f"{row['best_s']:.2f}", f"{row['median_s']:.2f}", f"{row['cpu_s']:.2f}",
            tables.size(row["fetched_bytes"]), f"{row['times_read']:.2f} x",
        )  # fmt: skip
    held = "as fast as the disk is" if rate is None else f"at most {rate:g} MB/s from the disk"
    about = (
        f"{checkpoint.address.name}, {tables.size(checkpoint.size)}, not in the page cache, {held}; {repeats} lap(s)"
    )
    files = sum(map(len, singles.values()))
    text = Group(
        about, shown,
        f"the sweep takes {found['to_the_slowest']:.2f} times as long as the slowest single job,"
        f" {found['to_all']:.2f} of all of them together",
        f"all {files} files of the {len(singles)} outputs are the same, byte for byte" if found["is_same"]
        else f"the outputs DIFFER: {', '.join(_differing(together.hashes, singles))}",
    )  # fmt: skip
    status = 0 if found["is_same"] else 1
    document = {
        "status": "done" if found["is_same"] else "failed", "source": str(checkpoint.address), "bytes": checkpoint.size,
        "rate_mb_s": rate, "repeats": repeats, "rows": rows, **found,
    }  # fmt: skip
    return Said(document, text, status)


def _row(case: Timed, size: int) -> dict[str, Any]:
    fetched = int(statistics.median(case.fetched))
    return {
        "case": case.name, "quants": list(case.quants), "best_s": min(case.seconds),
        "median_s": statistics.median(case.seconds),
        "cpu_s": statistics.median(case.cpu_s), "fetched_bytes": fetched, "times_read": fetched / size,
    }  # fmt: skip


def _differing(ours: Mapping[str, Mapping[str, str]], others: Mapping[str, Mapping[str, str]]) -> list[str]:
    names = sorted({(output, file) for each in (ours, others) for output, files in each.items() for file in files})
    return [f"{o}/{f}" for o, f in names if ours.get(o, {}).get(f) != others.get(o, {}).get(f)]
