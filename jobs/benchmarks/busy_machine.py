"""The load that other processes put on the machine during a benchmark. On a busy machine rates are too low, and only
ratios within one run mean something.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from loaders.backends.machine import usable_cpus

STAT = Path("/proc/stat")
FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
MUCH = 0.1  # the share of all CPU time from which on the load of others is reported


class Busy:
    """A measurement of what others used of the machine's CPUs, from its creation to the call of `document`."""

    def __init__(self) -> None:
        self._machine = _machine()
        self._own = _own_s()

    def document(self) -> dict[str, Any]:
        """Return shares (0 to 1) of the machine's CPU time, None if the system does not tell.

        `others_cpu_share` is that of other processes, `stolen_cpu_share` that of other virtual machines on the same
        hardware; `load_1m` is the system's load average.
        """
        found: dict[str, Any] = {"load_1m": None, "others_cpu_share": None, "stolen_cpu_share": None}
        # Some systems have no load average.
        with suppress(OSError, AttributeError):
            found["load_1m"] = os.getloadavg()[0]
        if self._machine is not None and (now := _machine()) is not None:
            took = {field: now[field] - self._machine[field] for field in FIELDS}
            whole = sum(took.values()) or 1.0
            worked = whole - took["idle"] - took["iowait"] - took["steal"]
            found["others_cpu_share"] = min(1.0, max(0.0, (worked - (_own_s() - self._own)) / whole))
            found["stolen_cpu_share"] = took["steal"] / whole
        return found


def machine() -> str:
    """Describe the processor, the number of CPUs and Python in one line."""
    return f"{platform.machine()}, {usable_cpus()} CPUs, Python {platform.python_version()}"


def warning(document: dict[str, Any]) -> str | None:
    """Return a warning about a busy machine; None if it was not busy, or does not tell."""
    others, stolen = document["others_cpu_share"] or 0.0, document["stolen_cpu_share"] or 0.0
    if others + stolen < MUCH:
        return None
    parts = ([f"other processes took {others:.0%}"] if others >= MUCH / 2 else []) + (
        [f"other virtual machines {stolen:.0%}"] if stolen >= MUCH / 2 else []
    )
    load = "" if document["load_1m"] is None else f" (load {document['load_1m']:.1f} on {usable_cpus()} CPUs)"
    return (
        f"the machine was busy: {' and '.join(parts)} of its CPU time{load}."
        " Rates are too low, and ratios scatter: run it again when it is idle"
    )


def _machine() -> dict[str, float] | None:
    """Return the seconds of all CPUs since the machine started, by kind of work; None without /proc/stat."""
    try:
        line = STAT.read_text().split("\n", 1)[0].split()
        return dict(zip(FIELDS, (int(each) / os.sysconf("SC_CLK_TCK") for each in line[1:]), strict=False))
    except (OSError, ValueError):  # Only Linux has the file.
        return None


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
