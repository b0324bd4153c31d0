"""What a sample of a thread's stack is counted as, when a job is profiled.

A stack belongs to the first row of `PHASES` that its innermost frame matches, or, if it matches none, the frame that
called it, and so on outwards. What matches nowhere is `OTHER`, of which a profile lists the functions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from loaders.places import ROOT

OTHER, UNITS, IMPORTS = "other", "ranges and units", "start: imports"
BESIDE = ("report", "tracking")
# The phase, a file or folder, and a pattern that is searched for in the function's qualified name. Rows in the order of
# a job; where a phase is inside of another, such as hashing in completing a file, its own files tell it apart.
PHASES = (
    (IMPORTS, "<frozen importlib", ""),
    ("start: settings", "jobs/cli", ""),
    ("start: settings", "jobs/spec", ""),
    ("start: kernels loaded", "numba/", ""),
    ("headers", "loaders/checkpoints", ""),
    ("headers", "loaders/containers", "read_header|header|open"),
    ("plan", "jobs/planning", ""),
    ("plan", "jobs/report/plan.py", ""),
    ("plan", "jobs/orchestration/preflight.py", ""),
    ("plan", "jobs/orchestration/needs.py", ""),
    ("plan", "jobs/orchestration/engine_check.py", ""),
    ("plan", "jobs/execution/merge.py", ""),
    ("read", "loaders/strategies", ""),
    ("read", "loaders/tensors/views.py", ""),
    ("hash", "loaders/containers/read_back.py", ""),
    ("hash", "loaders/storage/hashes.py", ""),
    ("read back", "loaders/containers/writer.py", r"\b(read|_get|_checksum)$"),
    ("write: sync", "loaders/containers/writer.py", "sync|seal|writeback"),
    ("write", "loaders/containers/writer.py", ""),
    ("write", "loaders/storage/atomic.py", ""),
    ("measure", "loaders/quantization/measure.py", "Comparison|compare|added|check|same"),
    (UNITS, "loaders/quantization/measure.py", ""),
    ("measure", "loaders/quantization/kernels", "decode|compare|scan|differ|same"),
    ("measure", "loaders/quantization/schemes", "decode|compare|grid|greatest_error"),
    ("measure", "loaders/tensors/encoding.py", "measure"),
    ("encode", "loaders/quantization", ""),
    ("encode", "loaders/tensors", ""),
    (UNITS, "loaders/backends", ""),
    (UNITS, "jobs/execution", ""),
    (UNITS, "concurrent/futures", ""),
    ("records", "jobs/output/journal.py", ""),
    ("lint", "loaders/lint", ""),
    ("report", "jobs/report", ""),
    ("report", "jobs/output/report.py", ""),
    ("publish", "jobs/output", ""),
    ("tracking", "jobs/tracking", ""),
)
NAMES = tuple(dict.fromkeys(phase for phase, _, _ in PHASES))
# What grows with the source, on all cores; the rest takes about as long however large the source is.
WORK = ("read", "encode", "measure", "write", "write: sync", "read back", "hash", UNITS)
# Functions in which a thread waits for another thread or process, rather than for the disk or for the lock.
WAITS = re.compile(r"^(threading|concurrent/futures/\w+|queue|selectors|subprocess|multiprocessing/\w+)\.py$")
WAITING = re.compile(r"(wait|get|acquire|result|poll|select|join|_wait_for_tstate_lock|_worker)$")
FRAME = re.compile(r"^(?P<function>.*) \((?P<file>[^()]*?)(?::\d+)?\)$")
PROCESS = re.compile(r"^process (\d+)")
THREAD = re.compile(r"^thread \(\w+\)(?:: (?P<name>.*))?$")


class Stack(NamedTuple):
    """One line of py-spy's raw format: where threads were in so many samples."""

    process: str
    thread: str
    phase: str
    is_waiting: bool  # for another thread or process
    innermost: str
    samples: int


def stacks_of(raw: str) -> list[Stack]:
    """Return the stacks of py-spy's raw format, recorded with --threads, --full-filenames and --subprocesses."""
    found = []
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if not stack or not count.isdigit():
            continue
        process, thread = "", ""
        frames: list[tuple[str, str]] = []
        for part in stack.split(";"):
            if (match := PROCESS.match(part)) and not frames:
                process = match[1]
            elif (match := THREAD.match(part)) and not frames:
                thread = match["name"] or ""
            elif match := FRAME.match(part):
                frames.append((_known(match["file"]), match["function"]))
        if frames:
            file, function = frames[-1]
            waits = bool(WAITS.match(file) and WAITING.search(function))
            found.append(Stack(process, thread, phase_of(frames), waits, f"{function} ({file})", int(count)))
    return found


def phase_of(frames: Sequence[tuple[str, str]]) -> str:
    """Return the phase of a stack of (file, function), outermost first."""
    found = (phase for file, function in reversed(frames) if (phase := _phase(file, function)))
    phase = next(found, OTHER)
    # What the report and tracking import, they do beside or after the work: it is a part of them.
    return next((outer for outer in found if outer in BESIDE), phase) if phase == IMPORTS else phase


@lru_cache(maxsize=4096)
def _phase(file: str, function: str) -> str:
    rows = ((phase, pattern) for phase, place, pattern in PHASES if file.startswith(place))
    return next((phase for phase, pattern in rows if re.search(pattern, function)), "")


@lru_cache(maxsize=4096)
def _known(file: str) -> str:
    """Return a file's path within this package, the standard library or site-packages."""
    for root in ("/site-packages/", "/dist-packages/", f"{ROOT}/"):
        if root in file:
            return file.rpartition(root)[2]
    return re.sub(r"^.*/python3\.\d+t?/", "", file)
