"""System calls that fail in the middle of a job: it ends with a line that says so, or well, and its rerun is right."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import Fault, Forks
from tests.kinds_of_jobs import KINDS, Outputs, hidden, made, outputs

CALLS = ("write", "pwrite", "fsync", "rename", "mmap", "open", "ftruncate")
ERRORS = (errno.EIO, errno.ENOSPC, errno.ENOMEM)
SHARES = (0.4, 0.7)  # of the calls of an undisturbed job, at which one fails
KIND = "nf4"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Forks, Path, Path, Outputs]]:
    """A process whose calls can fail, a source, a folder, and what the job makes undisturbed."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc), which builds what lets calls fail")
    folder = tmp_path_factory.mktemp("failing")
    library = folder / "failing_calls.so"
    code = Path(__file__).parents[1] / "failing_calls.c"
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-o", library, code, "-ldl"], capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"cc does not build a library for LD_PRELOAD here: {built.stderr[:200]}")
    warm = [KINDS[KIND].arguments(KINDS[KIND].source(folder / "warm"), folder / "warmed")]
    with Forks(folder, warm, {"LD_PRELOAD": str(library)}) as forks:
        source, wanted, _ = made(folder, KIND, forks)
        yield forks, source, folder, wanted


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_ends_the_job_with_a_line_or_not_at_all(
    call: str, job: tuple[Forks, Path, Path, Outputs]
) -> None:
    forks, source, folder, wanted = job
    calls = forks.run(*KINDS[KIND].arguments(source, folder / f"{call}-counted"), fault=Fault(call=call)).calls
    assert calls
    for number, share in enumerate(SHARES):
        error = ERRORS[(CALLS.index(call) + number) % len(ERRORS)]
        out = folder / f"{call}{number}"
        command = KINDS[KIND].arguments(source, out)
        ran = forks.run(*command, fault=Fault(call=call, call_at=max(1, round(share * calls)), error=error))
        where = f"{call} {round(share * calls)} of {calls}, {errno.errorcode[error]}"
        assert ran.complaint == "", where
        if ran.status != 0:
            assert ran.err.strip().splitlines()[-1].startswith("weightmill: "), where
            assert outputs(out) in ({}, wanted), where
            again = forks.run(*command)
            assert again.status == 0 or (again.status == 2 and "exists" in again.err), (where, again.err)
        assert outputs(out) == wanted, where
        assert hidden(out) == [], where
