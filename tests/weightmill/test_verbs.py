"""The verbs as functions: what the commands do, with nothing printed, and nothing left behind in the process."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightmill
from loaders.errors import setting
from loaders.places import DEMO, ROOT
from loaders.storage.settings import current

QUIET: dict[str, Any] = {"tracking": "none", "cluster": "local"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    made = tmp_path / "cwd"
    made.mkdir()
    monkeypatch.chdir(made)
    return made


def test_a_job_is_run_verified_and_done_already_in_silence(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hook, argv, settings, environment = sys.excepthook, [*sys.argv], current(), dict(os.environ)
    with caplog.at_level(logging.INFO, "weightmill"):
        made = weightmill.run(model="demo", quant="nf4", output="OUT", **QUIET)
    assert isinstance(made, weightmill.JobResult)
    assert (made.output, made.already, made.tracked) == (str(folder / "OUT"), False, None)
    assert made.report.totals.bits_per_weight == made.document["totals"]["bits_per_weight"]
    assert repr(made).startswith(f"<JobResult: {folder / 'OUT'}: nf4, ")
    assert f"output: {folder / 'OUT'}" in str(made)
    assert [each.name for each in folder.iterdir()] == ["OUT"]
    assert isinstance(made.output, str)
    assert (made.path / "weightmill.json").is_file()

    again = weightmill.run(model="demo", quant="nf4", output=Path("OUT"), **QUIET)
    assert isinstance(again, weightmill.JobResult)
    assert again.already
    assert again.report.tensors == made.report.tensors

    found = weightmill.verify(output="OUT")
    assert (found.is_right, found.faults, found.tensors) == (True, (), len(made.report.tensors))
    found.raise_for_faults()
    assert found
    weights = folder / "OUT" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    wrong = weightmill.verify(folder / "OUT")
    assert "its bytes are not those that were written" in wrong.faults[0]
    with pytest.raises(weightmill.VerifyFailed, match="its bytes are not those"):
        wrong.raise_for_faults()
    assert "NOT right, 1 fault," in repr(wrong)
    assert not wrong

    assert capfd.readouterr() == ("", "")
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert (sys.excepthook, sys.argv, current(), dict(os.environ)) == (hook, argv, settings, environment)
    assert setting("output") == "output", "a job's words are those of a job alone"


def test_a_plan_and_what_else_can_be_asked(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = weightmill.plan({"output": {"path": "P"}, "quant.group_size": np.int64(128)}, model=DEMO, quant="hqq4")
    assert plan.output == str(folder / "P")
    assert plan.document["output"]["quant"] == "hqq4"
    quantized = [tensor for tensor in plan.tensors if tensor.action == "quantize"]
    assert f"{len(quantized)} of {len(plan.tensors)} tensors quantized" in repr(plan)
    assert plan.bits_per_weight == plan.output_bytes * 8 / plan.parameters or plan.bits_per_weight > 4
    assert "bits per weight" in str(plan)
    measured = weightmill.plan(quant="auto", **{"quant.engine": "mlx", "quant.target_bits": 5.0})
    assert measured.to_be_measured is not None
    with pytest.raises(weightmill.WeightmillError, match="once a job has measured it"):
        _ = measured.output
    assert weightmill.inspect(DEMO).document["model_type"] == "llama"
    assert weightmill.lint(str(DEMO)).document["status"] == "done"
    assert [*folder.iterdir()] == []
    assert capfd.readouterr() == ("", "")


def test_lists_are_a_sweep(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[weightmill.Progress] = []
    made = weightmill.run({"quant": {"group_size": [64, 128]}}, quant=["nf4", "hqq4"], progress=told.append, **QUIET)
    assert isinstance(made, weightmill.SweepResult)
    assert {each.jobs for each in told} == {tuple(made.jobs)}, "one pass is for all jobs of a source"
    assert sorted(made.jobs) == [f"quant.group_size={g} quant={q}" for g in (128, 64) for q in ("hqq4", "nf4")]
    assert {Path(job.output).name for job in made.jobs.values()} == {
        "demo-nf4-g64", "demo-nf4-g128", "demo-hqq4-g64", "demo-hqq4-g128",
    }  # fmt: skip
    made.raise_for_failures()
    assert len(made.document["passes"]) == 1
    compared = weightmill.compare(*(job.output for job in made.jobs.values()))
    assert len(compared.document["runs"]) == 4
    with pytest.raises(weightmill.BadSpec, match="quant.group_size: unknown key") as refused:
        weightmill.run({"quant.group_size": [64]}, quant=["nf4", "none"], **QUIET)
    assert refused.value.hint is not None
    assert capfd.readouterr() == ("", "")
    assert not (folder / "outputs" / ".sweeps").exists()


def test_an_experiment_may_be_a_sweep(folder: Path) -> None:
    made = weightmill.run(experiment="bits4", quant=["nf4"], **QUIET)
    assert isinstance(made, weightmill.SweepResult)
    assert all("quant=nf4" in name for name in made.jobs)


def test_lint_is_true_where_there_are_no_faults(folder: Path) -> None:
    assert weightmill.lint(output=DEMO)
    shutil.copytree(DEMO, folder / "M")
    config = json.loads((folder / "M" / "config.json").read_text())
    del config["model_type"]
    (folder / "M" / "config.json").write_text(json.dumps(config))
    found = weightmill.lint("M")
    assert isinstance(found, weightmill.LintResult)
    assert not found
    assert not found.is_right
    assert "config.json has no model_type" in found.faults[0]
    with pytest.raises(weightmill.VerifyFailed, match="has no model_type"):
        found.raise_for_faults()


def test_a_name_within_a_group_chooses_and_labels_no_other_choice(folder: Path) -> None:
    """An output was called mlx_int4 and was NF4."""
    as_chosen = weightmill.plan({"quant.group_size": 32}, quant="mlx_int4")
    for asked in (
        {"quant": {"name": "mlx_int4", "group_size": 32}},
        {"quant.name": "mlx_int4", "quant.group_size": 32},
    ):
        plan = weightmill.plan(asked)
        assert Path(plan.output).name == "demo-mlx_int4-g32"
        assert plan.bits_per_weight == as_chosen.bits_per_weight
    swept = weightmill.run({"quant": {"name": ["nf4", "fp4"]}}, **QUIET)
    assert isinstance(swept, weightmill.SweepResult)
    assert [*swept.jobs] == ["quant=nf4", "quant=fp4"]
    refused = "quant.name: mlx_int4 is the name of another preset than quant="
    with pytest.raises(weightmill.BadSpec, match=refused):
        weightmill.plan({"quant.name": "mlx_int4"}, quant="nf4")
    with pytest.raises(weightmill.BadSpec, match=refused):
        weightmill.run({"quant.name": "mlx_int4"}, quant=["mlx_int4", "nf4"], **QUIET)
    named = weightmill.plan({"quant": {"name": "mine"}, "model.name": "llama8b"}, model=DEMO)
    assert Path(named.output).name == "llama8b-mine", "labels of one's own stay, and what model is given as"


def test_a_plan_of_lists_runs_nothing(folder: Path) -> None:
    """It once ran the sweep."""
    with pytest.raises(weightmill.BadSpec, match="quant: expected one value, found a list; plan does one thing"):
        weightmill.plan({"quant": ["nf4", "hqq4"]})
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: weightmill.plan("demo"), "settings: expected a mapping .* found 'demo'; .* model='demo'"),  # type: ignore[arg-type]
        (lambda: weightmill.compare(["a", "b"]), r"runs: expected folders .* found list; .* compare\(\*runs\)"),  # type: ignore[arg-type]
        (lambda: weightmill.inspect(["a"]), "model: expected the path or URL of a checkpoint, found list"),  # type: ignore[arg-type]
        (lambda: weightmill.verify(model="a"), "output: expected the path .* found none; .* output='DIR'"),
        (lambda: weightmill.lint("a", "b"), "settings: expected a mapping"),  # type: ignore[arg-type]
        (lambda: weightmill.run(progress=5), "progress: expected a function .* found 5"),  # type: ignore[call-overload]
        (lambda: weightmill.verify("a", progress="x"), "progress: expected a function .* found 'x'"),  # type: ignore[arg-type]
    ],
    ids=["plan", "compare", "inspect", "verify", "lint", "progress", "verify-progress"],
)  # fmt: skip
@pytest.mark.quick
def test_arguments_of_other_kinds_are_refused(call: Callable[[], object], said: str, folder: Path) -> None:
    with pytest.raises(weightmill.BadSpec, match=said):
        call()
    assert [*folder.iterdir()] == []


def test_a_failed_gate_has_fields(folder: Path) -> None:
    with pytest.raises(weightmill.VerifyFailed) as failed:
        weightmill.run({"verify.max_relative_error": 0.01}, **QUIET)
    error = failed.value
    assert (error.where or "").endswith(".weight")
    assert error.expected == "at most 0.01"
    assert 0.01 < float(error.found or 0) < 0.2


@pytest.mark.parametrize(
    ("settings", "said", "where", "hint"),
    [
        ({"quant": "nf5"}, "unknown choice 'nf5'", "quant", "did you mean 'nf4'"),
        ({"quant": "nf5"}, "unknown choice 'nf5'", "quant", "preset_names() lists all"),
        ({"quant": "nf4,hqq4"}, "expected one choice", "quant", "is a sweep: quant=['nf4', 'hqq4']"),
        ({"modle": "x"}, "unknown key", "modle", "did you mean 'model'?"),
        ({"unit_mb": "many"}, "expected a number", "unit_mb", None),
        ({"quant": object()}, "unknown choice", "quant", None),
        ({"rules": [{"action": "keep", "name": object()}]}, "found object", "rules", None),
        ({"quant": []}, "an empty list", "quant", None),
        ({"hydra.sweeper.n_trials": 3}, "for the command line", "hydra.sweeper.n_trials", "give lists"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all", "model.path", None),
        ({"output.root": "${oc.env:HOME}/${x}"}, None, None, None),
    ],
    ids=lambda given: re.sub(r" at 0x[0-9a-f]+", "", str(given)),
)
@pytest.mark.quick
def test_what_cannot_be_is_an_exception_with_the_fields_of_its_text(
    settings: dict[str, Any], said: str | None, where: str | None, hint: str | None, folder: Path
) -> None:
    if said is None:  # a text is the text itself, whatever Hydra makes of such words
        assert weightmill.plan(settings).output == f"{folder}/${{oc.env:HOME}}/${{x}}/demo-nf4"
        return
    with pytest.raises(weightmill.BadSpec) as refused:
        weightmill.plan(settings)
    problem = next(each for each in refused.value.details if said in each.text)
    assert problem.where == where
    assert hint is None or (problem.hint is not None and hint in problem.hint)


def test_progress_is_told_and_what_it_raises_stops_the_job(folder: Path) -> None:
    told: list[weightmill.Progress] = []
    weightmill.run(quant="nf4", output="OUT", unit_mb=1.0, progress=told.append, **QUIET)
    assert {(each.doing, each.jobs) for each in told} == {("quantizing", ())}
    assert [each.done for each in told] == sorted(each.done for each in told)
    assert told[-1].fraction == 1
    assert told[-1].last.startswith("unit-")
    assert told[-1].counted == "bytes"

    class Enough(Exception):
        pass

    def stop(progress: weightmill.Progress) -> None:
        raise Enough

    with pytest.raises(Enough):
        weightmill.run(quant="fp4", output="OTHER", unit_mb=1.0, progress=stop, **QUIET)
    assert not (folder / "OTHER").exists()
    weightmill.run(quant="fp4", output="OTHER", unit_mb=1.0, **QUIET)
    assert (folder / "OTHER").exists()


def test_jobs_of_several_threads_take_turns(folder: Path) -> None:
    made: dict[str, Any] = {}

    def job(quant: str) -> None:
        made[quant] = weightmill.run(quant=quant, **QUIET)

    threads = [threading.Thread(target=job, args=(quant,)) for quant in ("nf4", "fp4", "w8a8")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: Path(each.output).name for name, each in made.items()} == {
        "nf4": "demo-nf4", "fp4": "demo-fp4", "w8a8": "demo-w8a8",
    }  # fmt: skip


def test_another_program_s_hydra_stays_as_it_was(folder: Path) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    (folder / "mine.yaml").write_text("answer: 42\n")
    with initialize_config_dir(str(folder), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        assert weightmill.plan(quant="nf4").document["status"] == "planned"
        assert GlobalHydra.instance().hydra is before
        assert compose("mine").answer == 42


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
import weightmill

def caught():
    [line] = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("SigCgt")]
    return int(line.split()[1], 16) & 0x7FFFFFFF  # without those that the C library keeps for its threads

before = caught()

def told(progress):
    if progress.last:
        os.kill(os.getpid(), signal.SIGINT)

try:
    weightmill.run(quant="nf4", output="OUT", unit_mb=0.5, tracking="none", cluster="local", progress=told)
except KeyboardInterrupt as error:
    print("interrupted:", error)
print(weightmill.run(quant="nf4", output="OUT", unit_mb=0.5, tracking="none", cluster="local").already)
print(caught() == before)
"""


def test_an_interrupt_is_one_of_the_program_s_and_the_call_goes_on_from_there(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell may have it ignored
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    first, last, handlers = ran.stdout.splitlines()
    assert first.startswith("interrupted: interrupted; ")
    assert "the same command goes on from there" in first
    assert last == "False"
    assert handlers == "True", "no handler of a signal was set, not even below Python"
    assert ran.stderr == ""


def test_a_program_that_is_a_package_keeps_its_handlers(tmp_path: Path) -> None:
    """While `python -m PACKAGE` imports it, sys.argv looks as it does for `python -m jobs.run`."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("from weightmill import run\n")
    (tmp_path / "mine" / "__main__.py").write_text(
        "import signal, sys\n"
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, sys.excepthook is sys.__excepthook__)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "mine"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.stdout.split() == ["True", "True"], ran.stderr
