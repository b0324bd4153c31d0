"""What flies, in words for the progress display."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.execution.live import Live
from jobs.output.life import MachineSeen, Seen
from loaders.words import counted, in_a_line, size

MOST_LINES = 8  # machines with a line of their own; the others share one
MOST_NAMED = 3  # machines that a line names
OLD_S = 30.0  # seconds from which on the oldest unit is worth a word


class WatchedLive:
    """What a display shows of `Live`: see `jobs.cli.progress.Watched`. `where` is the cluster's description."""

    def __init__(self, live: Live, where: str) -> None:
        self._live, self._where = live, where

    def starting(self) -> str:
        seen = self._live.seen()
        if seen.done_bytes or seen.done or seen.failed:
            return ""
        sent = f"; {counted(len(seen.flying), 'unit')} sent to {_names(seen)}" if len(seen.machines) > 1 else ""
        return f"units start on {self._where} ({seen.seconds:.0f} s, nothing done yet{sent})"

    def summary(self) -> str:
        seen = self._live.seen()
        machines = ""
        if len(seen.machines) > 1:
            machines = f"{size(seen.bytes_per_s)}/s now on {counted(len(seen.machines), 'machine')} ({_names(seen)})"
        return "; ".join(filter(None, [machines, *_remarks(seen)]))

    def machines(self) -> Sequence[str]:
        seen = self._live.seen()
        lines = list[str]()
        if len(seen.machines) > 1:
            # Those that need a look first: they work, and are slow.
            rows = sorted(seen.machines, key=lambda each: (not each.flying, each.bytes_per_s, each.name))
            lines += [_line(each) for each in sorted(rows[:MOST_LINES], key=lambda each: each.name)]
            if others := rows[MOST_LINES:]:
                flying, rate = sum(each.flying for each in others), sum(each.bytes_per_s for each in others)
                lines.append(f"{len(others)} more: {counted(flying, 'unit')} in flight, {size(rate)}/s")
        return [*lines, *_remarks(seen)]


def _line(machine: MachineSeen) -> str:
    again = f", {counted(machine.retries, 'retry', 'retries')}" if machine.retries else ""
    return (
        f"{in_a_line(machine.name)}: {counted(machine.flying, 'unit')} in flight, {machine.done} done,"
        f" {size(machine.bytes_per_s)}/s{again}"
    )


def _names(seen: Seen) -> str:
    named = [in_a_line(each.name) for each in seen.machines[:MOST_NAMED]]
    return ", ".join(named) + ("" if len(seen.machines) <= MOST_NAMED else ", ...")


def _remarks(seen: Seen) -> list[str]:
    """Return what should be looked at: retries, failed units, the slowest unit."""
    found = [counted(seen.retries, "retry", "retries")] if seen.retries else []
    found += [f"{counted(len(seen.failed), 'unit')} failed"] if seen.failed else []
    if seen.flying:
        oldest = seen.flying[0]
        if oldest.seconds > OLD_S:
            still = f", no bytes for {oldest.still_s:.0f} s" if oldest.still_s > OLD_S else ""
            found.append(f"slowest: {oldest.unit} on {in_a_line(oldest.machine)}, {oldest.seconds:.0f} s{still}")
    return found
