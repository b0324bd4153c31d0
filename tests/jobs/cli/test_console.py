"""What is printed is text, whoever wrote it; and listeners that leave change no job."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.console import console
from jobs.cli.early import limit_of
from jobs.report.tables import table
from loaders.places import ROOT
from loaders.words import in_a_line, shown
from tests.conftest import Ran
from tests.making import LLAMA, llama_tensors, weights, write_checkpoint
from tests.other_users import as_nobody

Run = Callable[..., Ran]
RUN = f"{sys.executable} -m jobs.run tracking=none quant=none output.path=out"


def shell(line: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, text=True, capture_output=True, check=False, **options
    )


# --- strangers' words

HOSTILE = "[/b]\x1b]0;title\x07\x1b[2J\x9b31m[link=file:///etc]\u202e[bold]:smile:"


def test_control_characters_are_shown_as_escapes() -> None:
    assert shown("a\x1b[2J\x07\x7f\x9b\u202e\udce9\r") == r"a\x1b[2J\x07\x7f\x9b\u202e\udce9\r"
    assert shown("rows\n\tof ünï 漢字 🙂") == "rows\n\tof ünï 漢字 🙂"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A checkpoint that has hostile names of a tensor, a file and a model type."""
    import numpy as np

    tensors = {**llama_tensors(), f"x{HOSTILE}.weight": weights(np.ones((4, 4), np.float32), "F32")}
    source = write_checkpoint(tmp_path / "source [v2] [", tensors, config={**LLAMA, "model_type": HOSTILE})
    (source / f"a{HOSTILE.replace('/', '')}.txt").write_text("text")
    return source


@pytest.mark.parametrize("words", [["inspect"], ["plan", "quant=nf4"], ["run", "quant=none"], ["lint"], ["recommend"]])
def test_strangers_words_are_shown_as_text(words: list[str], hostile: Path, tmp_path: Path, weightmill: Run) -> None:
    verb, *others = words
    given = [str(hostile)] if verb in ("inspect", "lint") else [f"model.path={hostile}"]
    for form in ([], ["format=json"]):
        ran = weightmill(verb, *given, *others, *form)
        assert ran.status in (0, 1, 2)
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*ran.out, *ran.err}
        assert "Traceback" not in ran.err
        assert "MarkupError" not in ran.err
        if form:
            json.loads(ran.out)
    if verb == "inspect":
        assert "[v2]" in ran.out
        assert f"x{HOSTILE}.weight" in json.dumps(ran.document, ensure_ascii=False) or ran.document


BREAKS = ("\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028")


@pytest.mark.parametrize("end", BREAKS)
@pytest.mark.parametrize("where", ["tensor", "file", "model_type", "architectures"])
def test_a_strangers_line_break_is_refused_in_one_line(where: str, end: str, tmp_path: Path, weightmill: Run) -> None:
    import numpy as np

    name = f"x{end}weightmill: done"
    config = {**LLAMA, "model_type": name} if where == "model_type" else {**LLAMA, "architectures": [name]}
    tensors = {f"{name}.weight": weights(np.ones((4, 4), np.float32), "F32")} if where == "tensor" else {}
    source = write_checkpoint(
        tmp_path / "m", {**llama_tensors(), **tensors}, config=config if where in config else LLAMA
    )
    if where == "file":
        (source / f"{name}.txt").touch()
    ran = weightmill("plan", f"model.path={source}", "quant=nf4")
    assert ran.status == 1
    assert len(ran.err.splitlines()) == 1, ran.err
    assert ran.err.startswith("weightmill: failed: ")


def test_tabs_and_line_breaks_stay_in_their_cell() -> None:
    made = table("a", "b")
    made.add_row("x\n\ty", "z")
    said = io.StringIO()
    console(said).print(made)
    assert [line.split() for line in said.getvalue().splitlines()] == [["a", "b"], [r"x\n\ty", "z"]]
    assert in_a_line("a\n\tb\u2028\x1b") == r"a\n\tb\u2028\x1b"


def test_a_message_shows_them_too(tmp_path: Path, weightmill: Run) -> None:
    ran = weightmill("inspect", str(tmp_path / "no\x1b[2Jthing"))
    assert ran.status in (1, 2)
    assert r"no\x1b[2Jthing" in ran.err


# --- paths


def test_a_path_with_an_equals_sign_can_be_given_bare(source: Path, tmp_path: Path, weightmill: Run) -> None:
    out = tmp_path / "out-group_size=128"
    assert weightmill("run", f"model.path={source}", f"output.path={out}", "quant=none").status == 0
    for verb in ("verify", "lint", "inspect"):
        ran = weightmill(verb, out)
        assert ran.status == 0, ran.err


def test_a_path_with_a_line_break_is_that_path(source: Path, tmp_path: Path, weightmill: Run) -> None:
    out = tmp_path / "a\nb"
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", "quant=none")
    assert ran.status == 0, ran.err
    assert (out / "config.json").exists()
    assert not (tmp_path / "a b").exists()
    ran = weightmill("run", "-m", f"model.path={source}", f"output.path={tmp_path}/c\nd", "quant=none,nf4")
    assert ran.status == 2
    assert "output.path: a path with a line break; give the file or folder another name" in ran.err


# --- listeners

LEAVING = ("| true", ">&- 2>&-", ">/dev/full", "2>&1 | head -1", "format=json >/dev/full")


@pytest.mark.parametrize("listener", LEAVING)
def test_a_job_whose_listener_leaves_is_done(listener: str, tmp_path: Path) -> None:
    words, _, rest = listener.partition(" ") if listener.startswith("format") else ("", "", listener)
    ran = shell(f"set -o pipefail; ({RUN} {words}; echo $? >status) {rest}", tmp_path)
    assert (tmp_path / "status").read_text() == "0\n", ran.stderr
    assert "Traceback" not in ran.stderr
    assert (tmp_path / "out" / "config.json").exists()
    assert not list(tmp_path.glob(".out.*"))


def test_a_refused_job_keeps_its_status_without_a_listener(tmp_path: Path) -> None:
    ran = shell(f"{RUN} quant=nothing >&- 2>&-; echo $?", tmp_path)
    assert ran.stdout == "2\n"


def test_what_is_printed_goes_to_no_file_of_the_job(tmp_path: Path) -> None:
    """A file that is opened while descriptor 1 is closed would get that number."""
    assert shell(f"{RUN} >&- 2>&-", tmp_path).returncode == 0
    assert shell(f"{sys.executable} -m jobs.verify out", tmp_path).returncode == 0


# --- the first second


@pytest.mark.parametrize("module", ["pydantic", "jobs.spec.job"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_of_the_first_second_is_one_line(module: str, number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "jobs.run", "tracking=none"]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stderr
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == module:
                break
        process.send_signal(number)
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 130, said
    assert said == ["weightmill: stopped: interrupted\n"]


# --- limits


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such limits are not kept")
@pytest.mark.parametrize(("kind", "value"), [(resource.RLIMIT_NOFILE, 8), (resource.RLIMIT_AS, 470 << 20)])
def test_a_limit_that_is_too_low_is_one_line(kind: int, value: int, tmp_path: Path) -> None:
    ran = shell(RUN, tmp_path, preexec_fn=lambda: resource.setrlimit(kind, (value, value)))
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
    assert len(ran.stderr.splitlines()[-1]) < 500


def test_a_limit_of_threads_is_one_line(tmp_path: Path) -> None:
    limited = (
        "import resource, sys; sys.argv[0] = '-m'; import jobs; import numpy;"
        "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1)); from jobs.cli.main import main;"
        "sys.exit(main(['run', 'tracking=none', 'quant=none', 'output.path=/nowhere/out']))"
    )
    place = tmp_path
    ran = as_nobody("-c", limited, cwd=place, environment={"HOME": "/", "OPENBLAS_NUM_THREADS": "1"})
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("error", "is_limit"),
    [
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (OSError(24, "Too many open files"), True),
        (SystemError("<built-in> error return without exception set"), True),
        (RuntimeError("a bug"), False),
        (ImportError("No module named 'x'"), False),
        (OSError(2, "No such file or directory"), False),
    ],
)
def test_limits_are_told_from_bugs(error: Exception, is_limit: bool) -> None:
    assert (limit_of(error) is not None) == is_limit


@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
@pytest.mark.parametrize("form", ["", "format=json"])
def test_what_could_not_be_printed_is_said_by_a_verb_that_only_prints(where: str, form: str, tmp_path: Path) -> None:
    ran = shell(f"{sys.executable} -m jobs.inspect {ROOT / 'jobs' / 'demo'} {form} {where}", tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.count("weightmill: failed: standard output: ") == 1
    assert "Traceback" not in ran.stderr


def test_a_listener_who_leaves_has_what_he_wanted(tmp_path: Path) -> None:
    ran = shell(f"set -o pipefail; {sys.executable} -m jobs.inspect {ROOT / 'jobs' / 'demo'} | true", tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
