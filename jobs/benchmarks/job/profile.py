"""`weightmill bench job profile=true`: where a job's seconds go, by phase.

The same command runs several times: as it is, for its seconds by the kernel's count; and under py-spy, for the shares
of its phases. py-spy counts either threads that run, or all threads, or the one that holds the interpreter's lock.
Where `perf` is installed, a last run counts the CPU's samples within page faults and system calls.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.commands import Ran, job_command, ours, run_command
from jobs.benchmarks.job.phases import NAMES, OTHER, UNITS, WORK, Stack, stacks_of
from jobs.benchmarks.random_llama import given_or_random
from jobs.cli.verb import Said, note
from jobs.report.tables import Table, table
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec, StorageError
from loaders.missing import not_installed
from loaders.places import DEMO
from loaders.storage.hashes import hash_file

RATE = 200  # samples a second
KINDS = {"running": (), "all": ("--idle",), "holding": ("--gil",)}
CORES = (1, 2, 4, 8, 16, 32, 64, 128)
# Callers by which perf groups its samples: the entries into the kernel on x86-64 and arm64.
ENTRIES = r"^(__x64_sys_|__arm64_sys_|asm_exc_page_fault|el0_da|el0_ia)"
FAULTS = ("asm_exc_page_fault", "el0_da", "el0_ia")
MAIN = "MainThread"
USAGE = ("user_s", "system_s", "minor_faults", "waits", "preemptions")
SAID = """wall: the main thread's, and where it waits for units, theirs; CPU: all threads'; lock: the interpreter's;
blocked: threads' seconds for the disk, the lock, or a CPU; waiting: for other threads or processes"""
LISTED = 8  # functions of the phase "other", and kernel entries, that are shown


@dataclass
class Samples:
    """Samples of all runs of one kind, by phase; `stacks` has them all."""

    stacks: list[Stack] = field(default_factory=list)
    seconds: float = 0.0  # of the sampled commands

    @property
    def instants(self) -> float:
        """The times at which samples were taken."""
        return self.seconds * RATE

    def by_phase(self, wanted: Callable[[Stack], bool] = lambda stack: True) -> Counter[str]:
        found: Counter[str] = Counter()
        for stack in self.stacks:
            if wanted(stack):
                found[stack.phase] += stack.samples
        return found


def profile_job(path: str | None, gb: float, quant: str, tracking: str, folder: str | None, repeats: int) -> Said:
    """Profile a job from the page cache, `repeats` runs of each kind.

    Raises:
        BadSpec: py-spy is not installed, or may not look into another process.
        StorageError: the job failed.
    """
    spy = py_spy()
    with given_or_random(path, gb, folder) as (work, source):
        checkpoint = open_checkpoint(source)
        setting = "tracking=none" if tracking == "none" else f"tracking.uri=sqlite:///{work / 'mlflow.db'}"
        files = [source / tag.name for tag in checkpoint.files]
        command = job_command(source, [quant], f"output.path={work / 'output'}", tracking=setting)
        profiled = _Profiled(spy, command, files, work)
        note("a first job on the demo, which compiles kernels; they are kept")
        run_command(job_command(DEMO, [quant], f"output.path={work / 'first'}"), ours())
        busy = Busy()
        for lap in range(repeats):
            note(f"lap {lap + 1} of {repeats}: the command as it is; under py-spy, {len(KINDS)} times; under perf")
            profiled.lap()
        about = {"source": str(source), "bytes": checkpoint.size, "quant": quant, "repeats": repeats}
        return _said(profiled, checkpoint.size / 1e9, busy, about)


def py_spy() -> str:
    """Return the path of py-spy, after it has looked into this process's child.

    Raises:
        BadSpec: it is not installed, or the system does not let it.
    """
    found = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise not_installed("profile", ["py_spy"])
    # py-spy's exit status tells whether the system allows it.
    tried = subprocess.run(
        [found, "record", "-d", "1", "-r", "20", "-f", "raw", "-o", os.devnull, "--",
         sys.executable, "-c", "import time; time.sleep(0.5)"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tried.returncode:
        lines = [line.strip() for line in tried.stderr.splitlines() if line.strip()] or ["no message"]
        raise BadSpec(f"profile: py-spy cannot look into processes here; it needs ptrace, as root has it: {lines[-1]}")
    return found


class _Profiled:
    """A job's command, run in each way, and what was found."""

    def __init__(self, spy: str, command: Sequence[str], files: Sequence[Path], work: Path) -> None:
        self.plain: list[Ran] = []
        self.threads: list[Threads] = []
        self.samples = {kind: Samples() for kind in KINDS}
        self.entries: Counter[str] = Counter()
        self.no_perf = ""
        self._spy, self._command, self._files, self._work = spy, command, files, work

    def lap(self) -> None:
        """Run the command once in each way."""
        threads = Threads()
        self.plain.append(self._run(self._command, threads.watch))
        threads.stop()
        self.threads.append(threads)
        for kind, flags in KINDS.items():
            raw = self._work / f"{kind}.raw"
            common = ("-r", str(RATE), "-f", "raw", "--threads", "--full-filenames", "-F", "--subprocesses")
            # Samples of a process that goes on meanwhile: stopping its threads would wake those that wait.
            ran = self._run(
                [self._spy, "record", *common, "--nonblocking", *flags, "-o", str(raw), "--", *self._command]
            )
            self.samples[kind].stacks += stacks_of(raw.read_text())
            self.samples[kind].seconds += ran.seconds
        self._perf()

    def _perf(self) -> None:
        """Count samples within page faults and system calls, if perf is there and allowed."""
        if shutil.which("perf") is None:
            self.no_perf = "perf is not installed"
            return
        data = self._work / "perf.data"
        try:
            self._run(
                [
                    "perf",
                    "record",
                    "-q",
                    "-e",
                    "cpu-clock",
                    "-F",
                    str(RATE),
                    "-g",
                    "-o",
                    str(data),
                    "--",
                    *self._command,
                ]
            )
            said = run_command(
                ["perf", "report", "-i", str(data), "--stdio", "--no-children", "-g", "none", "-n", "-p", ENTRIES,
                 "-s", "parent"],
            ).said  # fmt: skip
        except StorageError as error:
            self.no_perf = f"perf: {error}"
            return
        self.entries += entries_of(said)

    def _run(self, command: Sequence[str], started: Callable[[int], None] | None = None) -> Ran:
        for file in self._files:
            # This brings the file into the page cache.
            hash_file(file)
        # What the last run left to be written out must not count for this one.
        os.sync()
        try:
            return run_command(command, ours(), started)
        finally:
            shutil.rmtree(self._work / "output", ignore_errors=True)


class Threads:
    """The kernel's own count for each thread of a process (Linux): CPU seconds, and seconds in a queue for a CPU."""

    PAUSE_S = 0.02  # threads that live shorter are not seen

    def __init__(self) -> None:
        self.found: dict[int, dict[str, Any]] = {}
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def watch(self, process: int) -> None:
        """Begin to read the threads' counters, until `stop`."""
        if Path(f"/proc/{process}/task").exists():
            self._watcher = threading.Thread(target=self._watch, args=(process,), name="bench-threads", daemon=True)
            self._watcher.start()

    def stop(self) -> None:
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()

    @property
    def queued_s(self) -> float:
        return sum(float(thread["queued_s"]) for thread in self.found.values())

    def _watch(self, process: int) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        while not self._ended.wait(self.PAUSE_S):
            # A thread may end between two reads.
            with suppress(OSError):
                for task in Path(f"/proc/{process}/task").iterdir():
                    with suppress(OSError, ValueError, IndexError):
                        name, _, rest = (task / "stat").read_text().rpartition(")")
                        fields = rest.split()
                        ran, queued, _ = (task / "schedstat").read_text().split()
                        self.found[int(task.name)] = {
                            "name": name.partition("(")[2], "user_s": int(fields[11]) / ticks,
                            "system_s": int(fields[12]) / ticks, "minor_faults": int(fields[7]),
                            "cpu_s": int(ran) / 1e9, "queued_s": int(queued) / 1e9,
                        }  # fmt: skip


def entries_of(report: str) -> Counter[str]:
    """Return the samples by entry into the kernel of `perf report -n -s parent`; [other] is the rest."""
    found: Counter[str] = Counter()
    for line in report.splitlines():
        if match := re.match(r"^\s+[\d.]+%\s+(\d+)\s+(\S+)\s*$", line):
            found[match[2]] += int(match[1])
    return found


def rows_of(samples: Mapping[str, Samples], wall_s: float, cpu_s: float) -> list[dict[str, Any]]:
    """Return a row for each phase, of samples "running", "all" and "holding": see KINDS.

    The wall seconds are those of the main thread. While it waits for units, they are those of the other threads: shared
    out by what these do. Wall and CPU seconds add up to `wall_s` and `cpu_s`, which were measured without py-spy.
    """
    everything, running = samples["all"], samples["running"]
    process = next((stack.process for stack in everything.stacks if stack.thread == MAIN), "")

    def leads(stack: Stack) -> bool:
        # Before Python's threading is imported, the main thread has no name.
        return stack.process == process and stack.thread in (MAIN, "")

    own = everything.by_phase(lambda stack: leads(stack) and not (stack.is_waiting and stack.phase == UNITS))
    left = everything.by_phase(leads)[UNITS] - own[UNITS]
    others = everything.by_phase(lambda stack: not leads(stack) and not stack.is_waiting)
    lead = {phase: own[phase] + left * others[phase] / (others.total() or 1) for phase in (*NAMES, OTHER)}
    active = running.by_phase(lambda stack: not stack.is_waiting)
    seen = everything.by_phase(lambda stack: not stack.is_waiting)
    waiting, holding = everything.by_phase(lambda stack: stack.is_waiting), samples["holding"].by_phase()
    rows = []
    for phase in (*NAMES, OTHER):
        threads_s = _seconds(seen[phase], everything, wall_s) - _seconds(active[phase], running, wall_s)
        held_s = _seconds(holding[phase], samples["holding"], wall_s)
        rows.append({
            "phase": phase, "wall_s": wall_s * lead[phase] / (sum(lead.values()) or 1),
            "cpu_s": cpu_s * active[phase] / (active.total() or 1), "lock_s": held_s, "lock_share": held_s / wall_s,
            "blocked_s": max(0.0, threads_s), "waiting_s": _seconds(waiting[phase], everything, wall_s),
        })  # fmt: skip
    return rows


def _seconds(count: float, samples: Samples, wall_s: float) -> float:
    """Return samples as seconds of a command that takes `wall_s`."""
    return wall_s * count / samples.instants if samples.instants else 0.0


def most_by_cores(rows: Sequence[Mapping[str, Any]], gb: float) -> list[dict[str, Any]]:
    """Return the most that threads of one process can do on more and more cores, in GB/s of the source, calculated.

    N cores do N GB in the CPU seconds of a GB's work, but never more than one GB in the seconds for which its work
    holds the interpreter's lock. The whole command takes the other phases' wall seconds besides.
    """
    work = [row for row in rows if row["phase"] in WORK]
    cpu, held = (sum(row[key] for row in work) / gb for key in ("cpu_s", "lock_s"))
    fixed = sum(row["wall_s"] for row in rows) - sum(row["wall_s"] for row in work)
    found = []
    for cores in CORES:
        seconds = max(cpu / cores, held, 1e-9)  # of a GB
        found.append({"cores": cores, "work_gbps": 1 / seconds, "command_gbps": gb / (fixed + gb * seconds)})
    return found


def _said(profiled: _Profiled, gb: float, busy: Busy, about: Mapping[str, Any]) -> Said:
    taken, plain = busy.document(), profiled.plain
    wall_s, cpu_s = (statistics.fmean(getattr(ran, key) for ran in plain) for key in ("seconds", "cpu_s"))
    rows = rows_of(profiled.samples, wall_s, cpu_s)
    kernel = {name: cpu_s * count / profiled.entries.total() for name, count in profiled.entries.most_common()}
    kernel.pop("[other]", None)
    usage = {key: statistics.fmean(getattr(ran, key) for ran in plain) for key in USAGE}
    queued_s = usage["queued_s"] = statistics.fmean(each.queued_s for each in profiled.threads)
    most = most_by_cores(rows, gb)
    here, said = machine(), warning(taken)
    lines = ", ".join(f"{key} {value}" for key, value in about.items())
    held = sum(row["lock_s"] for row in rows if row["phase"] in WORK) / gb
    text = Group(
        f"{here}; {lines}",
        _phases_table(rows),
        SAID,
        f"{usage['user_s']:.2f} s of CPU in user mode, {usage['system_s']:.2f} s in the kernel;"
        f" {usage['minor_faults']:,.0f} page faults without reads; threads left their CPU {usage['waits']:,.0f} times,"
        f" lost it {usage['preemptions']:,.0f} times, and stood in a queue for one for {queued_s:.2f} s",
        _kernel_said(kernel, profiled.no_perf),
        _other_said(profiled.samples["running"]),
        f"work holds the interpreter's lock for {held:.3f} s a GB; the most that threads of one process can do,"
        " calculated from that and the CPU seconds of work (the disk and memory not counted), GB/s:",
        _cores_table(most),
        *([] if said is None else [Text(said, style="yellow")]),
    )
    document = {
        "status": "done", "machine": here, "busy": taken, **about, "wall_s": wall_s, "cpu_s": cpu_s, "rows": rows,
        "usage": usage, "kernel_cpu_s": kernel, "kernel_missing": profiled.no_perf, "lock_s_per_gb": held, "most": most,
        "threads": [list(each.found.values()) for each in profiled.threads],
        "samples": {kind: {"seconds": each.seconds, "samples": each.by_phase().total()}
                    for kind, each in profiled.samples.items()},
    }  # fmt: skip
    return Said(document, text)


def _phases_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    titles = ("wall s", "CPU s", "lock held s", "of all time", "blocked s", "waiting s")
    shown = table("phase", *titles, right=titles)
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "phase"}
    for row in (*rows, {"phase": "sum", **total}):
        shown.add_row(
            row["phase"], f"{row['wall_s']:.2f}", f"{row['cpu_s']:.2f}", f"{row['lock_s']:.2f}",
            f"{row['lock_share']:.0%}", f"{row['blocked_s']:.2f}", f"{row['waiting_s']:.2f}",
        )  # fmt: skip
    return shown


def _cores_table(most: Sequence[Mapping[str, Any]]) -> Table:
    cores = [str(row["cores"]) for row in most]
    shown = table("cores", *cores, right=cores)
    shown.add_row("work alone", *(f"{row['work_gbps']:.3g}" for row in most))
    shown.add_row("the whole command", *(f"{row['command_gbps']:.3g}" for row in most))
    return shown


def _kernel_said(kernel: Mapping[str, float], no_perf: str) -> str:
    if no_perf:
        return f"page faults and system calls, CPU s: not known, {no_perf}"
    faults = sum(kernel.get(name, 0.0) for name in FAULTS)
    calls = [(re.sub(r"^__\w+?_sys_", "", name), s) for name, s in kernel.items() if name not in FAULTS][:LISTED]
    said = ", ".join(f"{name} {seconds:.2f}" for name, seconds in calls)
    return f"of the CPU s, by perf: page faults {faults:.2f}; system calls (and page faults in them): {said}"


def _other_said(running: Samples) -> str:
    functions: Counter[str] = Counter()
    for stack in running.stacks:
        if stack.phase == OTHER and not stack.is_waiting:
            functions[stack.innermost] += stack.samples
    listed = ", ".join(name for name, _ in functions.most_common(LISTED))
    return f"{OTHER}, the most first: {listed}" if listed else f"{OTHER}: nothing"
