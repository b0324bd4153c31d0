"""The texts of `weightmill status` and `weightmill list`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from jobs.report.tables import table, whole
from loaders.words import counted, in_a_line, size

MOST_ROWS = 8  # machines, and flying units, in a text; all of them are in the document
STYLES = {"complete": "bold green", "running": "bold", "silent": "bold red", "failed": "bold red"}
WORDS = {
    "complete": "complete",
    "running": "running",
    "silent": "silent: its driver is frozen, or its machine is gone",
    "stopped": "stopped",
    "failed": "failed",
}


def status_text(found: Mapping[str, Any]) -> RenderableType:
    """Return a status for people: one word, and what it rests on."""
    state = found["state"]
    lines: list[RenderableType] = [Text(f"{found['output']}: {WORDS[state]}", style=STYLES.get(state, ""))]
    if found["why"]:
        lines.append(Text(f"  {in_a_line(found['why'])}"))
    lines += [Text(f"  {line}") for line in (*_driver(found), *_work(found), *_report(found))]
    if found["machines"] and state in ("running", "silent"):
        lines.append(_machines(found["machines"]))
    if found["flying"]:
        lines.append(_flying(found["flying"]))
    lines += [Text(f"  {unit} failed: {in_a_line(why)}") for unit, why in list(found["failures"].items())[:MOST_ROWS]]
    if found["fault"]:
        lines.append(Text(f"  {in_a_line(found['fault'])}", style="red"))
    if state in ("stopped", "failed", "silent"):
        lines += _how_to_go_on(found)
    return Group(*lines)


def _driver(found: Mapping[str, Any]) -> Iterator[str]:
    driver = found["driver"]
    if driver is None:
        if found["state"] == "running":
            yield "it gives no signs of life yet: it looks at what was done before, or starts workers"
        return
    ago = "" if driver["last_sign_age_s"] is None else f", last sign of life {ago_text(driver['last_sign_age_s'])} ago"
    yield f"driver: {in_a_line(driver['host'])} pid {driver['pid']}, since {driver['started']}{ago}"
    yield f"on {in_a_line(driver['cluster'])}"


def _work(found: Mapping[str, Any]) -> Iterator[str]:
    units, moved = found["units"], found["bytes"]
    if units is None:
        return
    total = "" if units["total"] is None else f" of {units['total']}"
    rest = [f"{units[name]} {word}" for name, word in (("flying", "in flight"), ("failed", "failed")) if units[name]]
    rest += [f"{units['left']} left"] if units["left"] is not None else []
    rest += [counted(found["retries"], "retry", "retries")] if found["retries"] else []
    done = f"{units['done']}{total} done"
    yield f"units: {', '.join([done, *rest])}"
    if moved is not None and moved["total"]:
        left = "" if found["seconds_left"] is None else f", about {ago_text(found['seconds_left'])} left"
        now = f", {size(moved['per_s'])}/s now" if found["state"] == "running" else ""
        mean = f", {size(moved['mean_per_s'])}/s on average" if moved["done"] else ""
        yield f"bytes: {size(moved['done'])} of {size(moved['total'])} since it began{now}{mean}{left}"


def _report(found: Mapping[str, Any]) -> Iterator[str]:
    report = found["report"]
    if report is None:
        return
    if found["state"] != "complete":
        yield "there is an earlier output, which is replaced at the end"
    yield (
        f"{report['quant']} of {report['model']}: {size(report['output_bytes'])}, {report['bits_per_weight']:.3f} bits"
        f" per weight, relative error {report['relative_error']:.5f}"
    )
    warned = f", {counted(report['warnings'], 'warning')}" if report["warnings"] else ""
    where = counted(len(report["nodes"]), "machine")
    yield f"made {report['started']} in {report['wall_s']:.1f} s on {where}, {counted(report['units'], 'unit')}{warned}"


def _machines(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    numbers = ("in flight", "done", "retries", "per second")
    shown = table("machine", *numbers, right=numbers)
    for row in rows[:MOST_ROWS]:
        counts = (str(row["flying"]), str(row["done"]), str(row["retries"]))
        shown.add_row(row["name"], *counts, f"{size(row['bytes_per_s'])}")
    if others := rows[MOST_ROWS:]:
        sums = [str(sum(row[key] for row in others)) for key in ("flying", "done", "retries")]
        shown.add_row(f"{len(others)} more", *sums, size(sum(row["bytes_per_s"] for row in others)))
    return shown


def _flying(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    numbers = ("for", "bytes", "still for")
    shown = table("in flight, the oldest first", "machine", *numbers, right=numbers)
    for row in rows[:MOST_ROWS]:
        times = ago_text(row["seconds"]), size(row["bytes"]), ago_text(row["still_s"])
        shown.add_row(row["unit"], row["machine"], *times)
    return shown


def _how_to_go_on(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    units = found["units"]
    kept = "what is done is kept"
    if units is not None and units["total"] is not None:
        kept = f"{units['done']} of {units['total']} units are done and kept"
    first = "end its driver, and run" if found["state"] == "silent" else "run"
    if found["command"] is None:
        yield Text(f"{first} the same command again: {kept}")
        return
    yield Text(f"{first} the same command again, or this one; {kept}:")
    yield whole(f"  {found['command']}")


def list_text(root: str, rows: Sequence[Mapping[str, Any]], more: str) -> RenderableType:
    """Return a table of outputs, one a row, and what is wrong with some."""
    if not rows:
        return Group(
            f"no outputs of weightmill in {root}, and no journals of unfinished ones", *([more] if more else [])
        )
    numbers = ("size", "bits")
    shown = table("output", "state", "quant", *numbers, "when", "model", right=numbers)
    for row in rows:
        done = (
            "" if row["units_done"] is None else f" {row['units_done']}/{'?' if row['units'] is None else row['units']}"
        )
        bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        when = (row["when"] or "").replace("T", " ")[:16]
        name = row["output"].removeprefix(root).lstrip("/") or row["output"]
        taken = "" if row["bytes"] is None else size(row["bytes"])
        shown.add_row(name, f"{row['state']}{done}", row["quant"] or "", taken, bits, when, row["model"] or "")
    faults = [Text(f"{row['output']}: {in_a_line(row['fault'])}", style="red") for row in rows if row["fault"]]
    return Group(f"in {root}:", shown, *faults, *([more] if more else []))


def ago_text(seconds: float) -> str:
    """Write a length of time for people: 12 s, 3 min, 2.5 h, 4 days."""
    for unit, scale, least in (("days", 86400, 2 * 86400), ("h", 3600, 5400), ("min", 60, 120)):
        if seconds >= least:
            number = seconds / scale
            return f"{number:.1f} {unit}" if number < 10 and unit == "h" else f"{number:.0f} {unit}"
    return f"{seconds:.0f} s"
