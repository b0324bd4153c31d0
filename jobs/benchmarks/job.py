"""`python -m jobs.bench job`: a whole command, compared with copying the same files and with another tool's command."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs.benchmarks.busy_machine import Busy
from jobs.benchmarks.random_llama import given_or_random
from jobs.benchmarks.table import cases_said
from jobs.benchmarks.timing import Case, rotate
from jobs.cli.verb import Said, note
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec, io_errors
from loaders.places import ROOT
from loaders.storage.hashes import hash_file


def time_job(path: str | None, gb: float, quant: str, peer: str | None, folder: str | None, repeats: int) -> Said:
    """Time a job as a command, with its source in the page cache, next to a copy of the files and another tool.

    Raises:
        BadSpec: the peer's command has no {source} or {output}, or the source is not a checkpoint.
    """
    if peer is not None and not ("{source}" in peer and "{output}" in peer):
        raise BadSpec("peer: expected a command with {source} and {output} in it")
    with given_or_random(path, gb, folder) as (work, source):
        checkpoint = open_checkpoint(source)
        files = [source / tag.name for tag in checkpoint.files]
        ours = [
            sys.executable,
            "-m",
            "jobs.run",
            f"model.path={source}",
            f"quant={quant}",
            "tracking=none",
            "cluster=local",
        ]
        name = f"weightmill {quant}"
        cases = [
            Case("copy the weight files, and sync", _Command(None, files, work)),
            Case(name, _Command([*ours, "output.path={output}"], files, work)),
        ]
        if peer is None:
            cases.append(Case("another tool", None, "not given: peer='TOOL {source} {output}'"))
        else:
            command = [part.replace("{source}", str(source)) for part in shlex.split(peer)]
            cases.append(Case(f"peer: {peer}", _Command(command, files, work), beside=name))
        note(f"timing {len(cases)} cases, {repeats} laps each, the source read into the page cache before each")
        busy = Busy()
        rotate(cases, repeats, warm_up=0)
        about = {"source": str(source), "bytes": checkpoint.size, "repeats": repeats, "quant": quant}
        return cases_said(cases, checkpoint.size, busy, about)


class _Command:
    """A case that runs a command and removes its output; None stands for copying and syncing the files."""

    def __init__(self, command: list[str] | None, files: list[Path], work: Path) -> None:
        self.peak_bytes = 0
        self._command = command
        self._files = files
        self._work = work

    def __call__(self) -> float:
        """Run the command once; returns the seconds it took."""
        for file in self._files:
            # This brings the file into the page cache.
            hash_file(file)
        output = self._work / "output"
        try:
            began = time.perf_counter()
            if self._command is None:
                self._copy(output)
            else:
                self._run([part.replace("{output}", str(output)) for part in self._command])
            return time.perf_counter() - began
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def _copy(self, output: Path) -> None:
        output.mkdir()
        for file in self._files:
            with io_errors("copying", file):
                shutil.copyfile(file, output / file.name)
                with (output / file.name).open("rb+") as copy:
                    os.fsync(copy.fileno())

    def _run(self, command: list[str]) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": path})
            # wait4 gives this process's own resource usage; getrusage would mix it with that of earlier commands.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                lines = said.read().strip().splitlines() or ["no message"]
                raise RuntimeError(f"exit status {process.returncode}: {lines[-1]}")
        self.peak_bytes = max(self.peak_bytes, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
