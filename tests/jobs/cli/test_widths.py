"""What verbs print fits the terminal: at 80, 120 and 200 columns no line is longer, and no number is cut."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import RenderableType

from jobs.benchmarks.busy_machine import Busy
from jobs.benchmarks.table import cases_said
from jobs.benchmarks.timing import Case
from jobs.cli.console import ALL_COLUMNS, console
from jobs.cli.verb import Said, note
from jobs.output.report import read_report
from jobs.report.comparison import ComparedJob, Comparison
from jobs.report.result import result_text
from jobs.verification.output import by_cause
from loaders.places import ROOT
from loaders.storage.address import Address
from tests.conftest import Ran
from tests.jobs.orchestration.test_status import LIFE
from tests.making import make_source

Run = Callable[..., Ran]
WIDTHS = (80, 120, 200)
NUMBER = re.compile(r"(?<![\w./-])\d[\d,]*(?:\.\d+)?(?!\.?[\w/])")
CHANGES = ("free", "page cache", "http")  # lines of numbers that differ from run to run
BENCHED = ("plain copy", "ours, of a name that is long enough to fill a terminal")


def numbers_of(text: str) -> set[str]:
    """The numbers of a text, but for lines whose numbers change."""
    lines = [line for line in text.splitlines() if not any(word in line for word in CHANGES)]
    return set(NUMBER.findall("\n".join(lines)))


def long_lines(text: str, width: int) -> list[str]:
    """The lines that are longer than a terminal, but addresses, which are whole to be pasted."""
    return [line for line in text.splitlines() if len(line) > width and "http" not in line]


@pytest.fixture
def made(tmp_path: Path, weightmill: Run) -> Path:
    """A folder of outputs of a source with tensors of long names."""
    source = make_source(tmp_path / "a-source")
    for quant in ("nf4", "gguf_q8_0"):
        arguments = (f"model.path={source}", f"quant={quant}", f"output.root={tmp_path / 'outputs'}")
        assert weightmill("run", *arguments).status == 0
    return tmp_path


VERBS = (
    ("plan", "model.path={root}/a-source", "quant=int8", "unit_mb=0.005"),
    ("plan", "model.path={root}/a-source", "quant=gguf_q4_k_m", "tensors=all"),
    ("inspect", "{root}/a-source"),
    ("inspect", "{root}/outputs/a-source-gguf_q8_0", "tensors=all"),
    ("diff", "{root}/a-source", "{root}/outputs/a-source-nf4"),
    ("diff", "{root}/a-source", "{root}/outputs/a-source-gguf_q8_0", "tensors=all"),
    ("compare", "runs=[{root}/outputs/a-source-nf4,{root}/outputs/a-source-gguf_q8_0]"),
    ("recommend", "{root}/a-source", "backend.memory_gb=2"),
    ("verify", "{root}/outputs/a-source-nf4"),
    ("lint", "{root}/outputs/a-source-nf4"),
    ("lint", "{root}/unfinished"),
    ("clean", "output.root={root}/left"),
    ("status", "{root}/outputs/a-source-nf4"),
    ("status", "{root}/left/{name}"),
    ("list", "{root}/outputs"),
    ("list", "{root}/left"),
)


def test_what_verbs_print_fits_and_has_whole_numbers(
    made: Path, weightmill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a-long-name-" * 5
    (made / "left" / f".{name}.0123456789ab.weightmill").mkdir(parents=True)
    (made / "left" / f".{name}.0123456789ab.weightmill" / "life.json").write_bytes(LIFE.to_bytes())
    make_source(made / "unfinished", quantization_config={"quant_method": "bitsandbytes"})
    kept: list[Said] = []
    monkeypatch.setattr("jobs.cli.verb.say", lambda said, _: (kept.append(said), said.status)[1])
    for verb, *words in VERBS:
        given = [verb, *(word.format(root=made, name=name) for word in words)]
        ran = weightmill(*given)
        assert kept, ran.err
        text = kept.pop().text
        whole = printed(text, 1000, monkeypatch)
        for width in WIDTHS:
            for every in (False, True):
                said = printed(text, width, monkeypatch, every=every)
                assert long_lines(said, width) == [], given
                assert numbers_of(said) <= numbers_of(whole), given
            assert numbers_of(said) == numbers_of(whole), given  # of all columns


def printed(what: RenderableType, width: int, monkeypatch: pytest.MonkeyPatch, *, every: bool = False) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    token, stream = ALL_COLUMNS.set(every), io.StringIO()
    console(stream).print(what, crop=False)
    ALL_COLUMNS.reset(token)
    return stream.getvalue()


def test_the_ends_of_jobs_sweeps_and_benchmarks_fit(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = read_report(Address.of(made / "outputs" / "a-source-nf4"))
    names = ("size/bits_per_weight", "error/relative", "quality/kl", "quality/kl_low", "quality/kl_high", "time/wall_s")
    jobs = [
        ComparedJob(
            name=f"a-model-of-a-long-name-mlx_int{bits}-g128",
            status="done",
            metrics={name: bits + at * 1.2345678 for at, name in enumerate(names)},
            tensors={f"model.layers.{n}.part{n}.q_proj.weight": n / bits for n in (1, 2, 30)},
        )
        for bits in (2, 3, 4)
    ]
    failed = ComparedJob(name="a-model-of-a-long-name-nf4", status="failed", why="the disk is full " * 8)
    cases = [Case(name=name, call=lambda: 0.0, seconds=[1.23456, 2.34567, 3.45678]) for name in BENCHED]
    bench = cases_said([*cases, Case(name="peer", call=lambda: 0.0, missing="it is not installed")], 10**9, Busy(), {})
    for what in (result_text(report), *Comparison([*jobs, failed], "quality/kl").lines(), bench.text):
        whole = printed(what, 1000, monkeypatch)
        for width in WIDTHS:
            said = printed(what, width, monkeypatch)
            assert long_lines(said, width) == []
            assert numbers_of(said) <= numbers_of(whole)


def test_notes_end_between_words_on_a_terminal_and_are_whole_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "  demo: a-job-of-a-very-long-name/that-is-longer/than-a-line, another-job, and 123,456,789.25 of others"
    monkeypatch.setenv("COLUMNS", "40")
    note(text)
    assert capsys.readouterr().err == f"{text}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    note(text)
    said = capsys.readouterr().err
    assert said.split() == text.split()
    assert max(map(len, said.splitlines())) == len("  a-job-of-a-very-long-name/that-is-longer/than-a-line,")


@pytest.mark.quick
def test_faults_of_one_cause_are_one_line() -> None:
    faults = [f"a.safetensors: layers.{n}.w: its bytes are not those that were written" for n in range(90)]
    faults += [f"layers.{n}.w: its error is 0.{n}5e-3, not what was recorded" for n in range(3)]
    assert by_cause([*faults, "b.safetensors is gone"]) == [
        "a.safetensors: layers.0.w: its bytes are not those that were written (and 89 more alike)",
        "layers.0.w: its error is 0.05e-3, not what was recorded (and 2 more alike)",
        "b.safetensors is gone",
    ]


def test_memory_is_shown_as_kubectl_top_would_show_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = read_report(Address.of(made / "outputs" / "a-source-nf4"))
    for seen, said in ((123_456_789, "; kubectl top would show 123.46 MB, with cached files\n"), (None, " MB\n")):
        run = report.run.model_copy(update={"peak_anonymous_bytes": 42_000_000, "peak_working_set_bytes": seen})
        text = printed(result_text(report.model_copy(update={"run": run})), 80, monkeypatch)
        assert f"peak memory: 42.00{' MB' if seen else ''}{said}" in text


def test_on_a_terminal_its_width_counts(tmp_path: Path) -> None:
    source = make_source(tmp_path / "a-source")
    said = {}
    for width in (80, 200):
        shown, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        command = [sys.executable, "-m", "jobs.inspect", str(source), "tensors=all"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
        environment.pop("COLUMNS", None)
        with subprocess.Popen(command, stdout=terminal, cwd=tmp_path, env=environment) as process:
            os.close(terminal)
            text = b""
            while block := _read(shown):
                text += block
        os.close(shown)
        assert process.returncode == 0
        said[width] = re.sub(r"\x1b\[[\d;]*m", "", text.decode()).replace("\r\n", "\n")
        assert long_lines(said[width], width) == []
    assert "tensor: ... .weight" in said[80]
    assert "model.layers.0.self_attn.q_proj.weight" in said[200]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""
