"""The table and the document of a benchmark's cases."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.timing import Case
from jobs.cli.verb import Said
from jobs.report.tables import table

SAID = """faster: median over median, of this run
measured: encoding and measuring, of the time of encoding alone"""


def cases_said(cases: Sequence[Case], size: int, busy: Busy, about: Mapping[str, Any]) -> Said:
    """Return the table and document of timed cases, each of which took `size` bytes of input."""
    taken = busy.document()
    rows = [_row(case, size, {c.name: c for c in cases}) for case in cases]
    numbers = ("median s", "GB/s median", "ours is faster", "measured", "best s", "GB/s best", "laps", "peak RSS MB")
    shown = table("case", *numbers, right=numbers)
    for row in (row for row in rows if not row["missing"]):
        faster = f"{row['times_faster']:.1f} x" if row["times_faster"] else ""
        measured = f"{row['times_encoding']:.2f}" if row["times_encoding"] else ""
        peak = f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else ""
        shown.add_row(
            row["case"], f"{row['median_s']:.4g}", f"{row['gbps_median']:.3g}", faster, measured,
            f"{row['best_s']:.4g}", f"{row['gbps_best']:.3g}", str(row["laps"]), peak,
        )  # fmt: skip
    missing = [f"{row['case']}: {row['missing']}" for row in rows if row["missing"]]
    here, said = machine(), warning(taken)
    lines = ", ".join(f"{key} {value}" for key, value in about.items())
    text = Group(f"{here}; {lines}", shown, *missing, SAID, *([] if said is None else [Text(said, style="yellow")]))
    return Said({"status": "done", "machine": here, "busy": taken, **about, "rows": rows}, text)


def _row(case: Case, size: int, cases: Mapping[str, Case]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": case.name,
        "missing": case.missing,
        "times_faster": None,
        "times_encoding": None,
        "peak_bytes": 0,
    }
    if case.missing or not case.seconds:
        return {**row, "missing": case.missing or "not run"}
    best, median = min(case.seconds), statistics.median(case.seconds)
    ours, encoder = cases.get(case.beside), cases.get(case.after)
    return {
        **row,
        "laps": len(case.seconds),
        "best_s": best,
        "median_s": median,
        "gbps_best": size / best / 1e9,
        "gbps_median": size / median / 1e9,
        "times_faster": median / statistics.median(ours.seconds) if ours and ours.seconds else None,
        "times_encoding": 1 + median / statistics.median(encoder.seconds) if encoder and encoder.seconds else None,
        "peak_bytes": getattr(case.call, "peak_bytes", 0),
    }
