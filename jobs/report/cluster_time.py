"""A planned job on machines that are not there, as text and as a part of the plan's document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.text import Text

from jobs.planning.reckoning import Machines, Part, Reckoned
from jobs.report.tables import size, table
from loaders.words import counted

WORDS: dict[Part, str] = {
    "reading": "reading the source",
    "cpu": "the CPUs",
    "writing": "writing the output",
    "tail": "the last units, for which other machines wait",
    "driver": "the driver",
    "start": "the start",
    "end": "the end, on one machine",
}


class Rate(Protocol):
    """A number that was reckoned with, and where it is from: "measured here", "given" or "assumed"."""

    @property
    def what(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def unit(self) -> str: ...
    @property
    def taken(self) -> str: ...


class Time(Protocol):
    """A job on so many machines."""

    @property
    def machines(self) -> Machines: ...
    @property
    def reckoned(self) -> Reckoned: ...
    @property
    def rates(self) -> Sequence[Rate]: ...
    @property
    def units(self) -> int: ...
    @property
    def read(self) -> float: ...
    @property
    def written(self) -> float: ...
    @property
    def notes(self) -> Sequence[str]: ...


def cluster_text(time: Time) -> RenderableType:
    """Render the time, what binds it, the bytes, and the rates by where they are from."""
    machines, reckoned = time.machines, time.reckoned
    places = machines.count * machines.units_at_once
    shown = table("of the time", "s", "", right=("s",))
    for part, seconds in sorted(reckoned.parts.items(), key=lambda item: -item[1]):
        shown.add_row(WORDS[part], f"{seconds:.1f}", "the bottleneck" if part == reckoned.bottleneck else "")
    moved = table("bytes", "in all", "of a machine", "GB/s in all", right=("in all", "of a machine", "GB/s in all"))
    for what, total, (least, most) in (
        ("read", time.read, reckoned.read),
        ("written", time.written, reckoned.written),
    ):
        each = size(most) if size(least) == size(most) else f"{size(least)} to {size(most)}"
        moved.add_row(what, size(total), each, f"{total / 1e9 / reckoned.seconds:.2f}")
    rates = table("reckoned with", "", "from", right=("",))
    for rate in sorted(time.rates, key=lambda each: ("measured here", "given", "assumed").index(each.taken)):
        rates.add_row(rate.what, f"{rate.value:.3g} {rate.unit}".strip(), rate.taken)
    return Group(
        "",
        Text(
            f"on {counted(machines.count, 'machine')}: about {said(reckoned.seconds)}; {counted(time.units, 'unit')},"
            f" {places} at once ({machines.units_at_once} a machine, {counted(machines.threads, 'thread')} each)",
            style="bold",
        ),
        Text(f"what binds: {WORDS[reckoned.bottleneck]}{_hint(time)}"),
        shown, moved, rates,
        *(Text(f"note: {note}", style="cyan") for note in time.notes),
    )  # fmt: skip


def _hint(time: Time) -> str:
    """Say what to do about a bottleneck that more machines do not mend."""
    places = time.machines.count * time.machines.units_at_once
    if time.reckoned.bottleneck == "tail":
        return f"; {time.units} units for {places} places: a smaller unit_mb makes more, and smaller files"
    if time.reckoned.bottleneck == "driver":
        return "; a larger unit_mb makes fewer units"
    return ""


def said(seconds: float) -> str:
    """Say a time as people do: 48 s, 12 min 30 s, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {left} s"
    return f"{minutes // 60} h {minutes % 60} min"


def cluster_document(time: Time) -> dict[str, Any]:
    """Describe it as JSON: seconds, bytes, and rates with where they are from."""
    machines, reckoned = time.machines, time.reckoned
    return {
        "nodes": machines.count,
        "units": time.units,
        "units_at_once": machines.count * machines.units_at_once,
        "units_per_node": machines.units_at_once,
        "threads": machines.threads,
        "seconds": reckoned.seconds,
        "bottleneck": reckoned.bottleneck,
        "seconds_of": dict(reckoned.parts),
        "slowest_unit_s": reckoned.slowest_unit_s,
        "read_bytes": time.read,
        "written_bytes": time.written,
        "read_bytes_of_a_node": {"least": reckoned.read[0], "most": reckoned.read[1]},
        "written_bytes_of_a_node": {"least": reckoned.written[0], "most": reckoned.written[1]},
        "rates": [
            {"what": rate.what, "value": rate.value, "unit": rate.unit, "from": rate.taken} for rate in time.rates
        ],
        "notes": list(time.notes),
    }
