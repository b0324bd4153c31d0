"""Sweeps: one pass over a source for all its jobs, the bytes of single jobs, and what becomes of those that fail."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jobs.execution.unit
from jobs.cli.compose import Request
from jobs.cli.multirun import Composed
from jobs.cli.sweep_folders import SweepFolders
from jobs.orchestration.refusals import command, grids
from jobs.output.journal import Journal
from loaders.errors import StorageError
from tests.journals import find_journals
from tests.making import snapshot, write_checkpoint
from tests.processes import start


def test_a_sweep_names_its_jobs_sums_up_and_leaves_no_folder(tmp_path: Path, source: Path, weightmill: Any) -> None:
    ran = weightmill("run", "-m", f"model.path={source}", f"output.root={tmp_path / 'o'}", "quant=nf4,ternary")
    assert ran.status == 0, ran.err
    assert "2 jobs:" in ran.out
    assert not (tmp_path / "o" / ".sweeps").exists()


def test_a_sweep_removes_the_folders_of_those_that_were_killed_and_of_no_others(
    tmp_path: Path, source: Path, weightmill: Any
) -> None:
    sweeps = tmp_path / "o" / ".sweeps"
    for name, file in (("killed", "multirun.yaml"), ("alive", "multirun.yaml"), ("of_a_user", "notes.txt")):
        (sweeps / name).mkdir(parents=True)
        (sweeps / name / file).touch()
    alive = os.open(sweeps / "alive", os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    weightmill("run", "-m", f"model.path={source}", f"output.root={tmp_path / 'o'}", "quant=nf4,ternary")
    os.close(alive)
    assert {path.name for path in sweeps.iterdir()} == {"alive", "of_a_user"}


def test_a_folder_that_a_killed_sweep_of_the_same_second_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / ".sweeps" / "2026-01-01_00-00-00"
    folder.mkdir(parents=True)
    (folder / "multirun.yaml").touch()
    again = SweepFolders()
    again.begin(folder)
    again.end()
    assert not folder.parent.exists()


REPORT = "weightmill.json"
UNITS = "unit_mb=0.05"  # several of them
QUANTS = ("nf4", "mlx_int4", "hqq4")


def outputs(root: Path) -> dict[str, dict[str, bytes]]:
    return {
        p.name: snapshot(p, ignore=[REPORT])
        for p in sorted(root.iterdir())
        if p.is_dir() and not p.name.startswith(".") and (p / REPORT).exists()
    }


def given(source: Path, root: Path, *more: str) -> list[str]:
    return [f"model.path={source}", f"output.root={root}", *more]


@pytest.fixture
def singles(source: Path, tmp_path: Path, weightmill: Any) -> dict[str, dict[str, bytes]]:
    for quant in QUANTS:
        ran = weightmill("run", *given(source, tmp_path / "singles", f"quant={quant}", UNITS))
        assert ran.status == 0, ran.err
    return outputs(tmp_path / "singles")


def swept(source: Path, root: Path) -> list[str]:
    return ["-m", *given(source, root, f"quant={','.join(QUANTS)}", UNITS)]


@pytest.mark.quick
def test_a_sweep_reads_once_and_makes_the_bytes_of_single_jobs(
    source: Path, tmp_path: Path, weightmill: Any, singles: Any
) -> None:
    """hqq4 is one file, the others have several: all are cut into the same units."""
    ran = weightmill("run", *swept(source, tmp_path / "swept"), "format=json")
    assert ran.status == 0, ran.err
    [read] = ran.document["passes"]
    assert read["bytes_read"] == read["source_bytes"]
    assert read["jobs"] == len(QUANTS)
    assert outputs(tmp_path / "swept") == singles
    assert [job["number"] for job in ran.document["jobs"]] == [1, 2, 3]
    assert len({job["run"]["units"] for job in ran.document["jobs"]}) == 1
    assert find_journals(tmp_path / "swept") == []


def test_a_sweep_that_was_done_is_not_done_again(source: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", "-m", *given(source, tmp_path / "o", "quant=nf4,fp4")).status == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*") if path.is_file()}
    more = ("quant=nf4,fp4,int8", "output.overwrite=true")  # which is for outputs of something else
    ran = weightmill("run", "-m", *given(source, tmp_path / "o", *more), "format=json")
    assert [p["jobs"] for p in ran.document["passes"]] == [1]
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())
    os.utime(next(source.glob("*.safetensors")))  # another source, as far as one can tell
    again = weightmill("run", "-m", *given(source, tmp_path / "o", "quant=nf4,fp4"))
    assert again.status == 2
    assert "exists, made from another version of the source: model-0000" in again.err
    assert "was written anew since; output.overwrite=true replaces it" in again.err


def test_killed_in_the_middle_only_what_is_missing_is_done(source: Path, tmp_path: Path, weightmill: Any) -> None:
    root, quants = tmp_path / "killed", "quant=nf4,fp4,mlx_int4"
    slow = (
        "import sys, time, jobs.execution.unit as u; honest = u.run_unit\n"
        "def run(task, on_bytes, stop):\n    time.sleep(0.3); return honest(task, on_bytes, stop)\n"
        "u.run_unit = run\n"
        "from jobs.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["-m", *given(source, root, quants), "unit_mb=0.02", "tracking=none", "cluster.units_at_once=1"]
    process = start("-c", slow, "run", *arguments)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(list(root.glob(".*/records/*.json"))) < 5:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    kept = len(list(root.glob(".*/records/*.json")))
    assert kept >= 5
    assert outputs(root) == {}
    ran = weightmill("run", *arguments, "format=json")
    assert ran.status == 0, ran.err
    reports = [job["run"] for job in ran.document["jobs"]]
    assert sum(run["units_resumed"] for run in reports) == kept
    [read] = ran.document["passes"]
    assert 0 < read["bytes_read"] < read["source_bytes"]
    assert [Path(job["output"]).name for job in ran.document["jobs"]] == [f"source-{q}" for q in quants[6:].split(",")]
    assert weightmill("run", "-m", *given(source, tmp_path / "whole", quants), "unit_mb=0.02").status == 0
    assert outputs(root) == outputs(tmp_path / "whole")


def test_a_job_that_fails_is_left_out_and_the_others_finish(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = []
    honest = jobs.execution.unit.TargetRun.begin

    def broken(self: Any, placement: Any) -> Any:
        if "fp4" in str(self._share.output):
            began.append(self._share.unit.id)
            raise ZeroDivisionError("a bug")
        return honest(self, placement)

    monkeypatch.setattr(jobs.execution.unit.TargetRun, "begin", broken)
    arguments = ["-m", *given(source, tmp_path / "o", "quant=nf4,fp4,mlx_int4", UNITS), "cluster.units_at_once=1"]
    ran = weightmill("run", *arguments, "format=json")
    assert ran.status == 1
    assert [job["status"] for job in ran.document["jobs"]] == ["done", "failed", "done"]
    assert "a bug" in ran.document["jobs"][1]["problems"][0]
    assert len(began) == 1  # not begun again in later units
    assert sorted(outputs(tmp_path / "o")) == ["source-mlx_int4", "source-nf4"]
    monkeypatch.undo()
    ran = weightmill("run", *arguments, "format=json")
    assert ran.status == 0
    assert [p["jobs"] for p in ran.document["passes"]] == [1]


def test_a_record_that_cannot_be_written_fails_its_own_job(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Journal.add

    def full(self: Any, record: Any) -> None:
        if "fp4" in str(self.output):
            raise StorageError("the disk is full")
        honest(self, record)

    monkeypatch.setattr(Journal, "add", full)
    ran = weightmill("run", "-m", *given(source, tmp_path / "o", "quant=nf4,fp4", "format=json"))
    assert ran.status == 1
    assert [job["status"] for job in ran.document["jobs"]] == ["done", "failed"]
    assert "the disk is full" in ran.document["jobs"][1]["problems"][0]


def test_a_gate_that_one_job_does_not_pass_stops_only_that(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill(
        "run", "-m", *given(source, tmp_path / "o", "quant=nf4", "verify.max_relative_error=0.001,0.5", "format=json")
    )
    assert ran.status == 1
    assert [job["status"] for job in ran.document["jobs"]] == ["failed", "done"]
    assert "at most 0.001 allowed" in ran.document["jobs"][0]["problems"][0]


def test_a_damaged_source_fails_its_own_jobs(source: Path, tmp_path: Path, weightmill: Any) -> None:
    bad = write_checkpoint(tmp_path / "bad")
    next(bad.glob("*.safetensors")).write_bytes(b"\x00" * 64)
    ran = weightmill(
        "run", "-m", f"model.path={bad},{source}", f"output.root={tmp_path / 'o'}", "quant=nf4,fp4", "format=json"
    )
    assert ran.status == 1
    assert [job["status"] for job in ran.document["jobs"]] == ["failed", "failed", "done", "done"]


def test_what_makes_no_sense_is_refused_by_name_and_the_rest_offered(
    source: Path, tmp_path: Path, weightmill: Any
) -> None:
    ran = weightmill("run", "-m", *given(source, tmp_path / "o", "quant=nf4,int8,fp4", "quant.group_size=64,100,128"))
    assert ran.status == 2
    assert "quant=int8 quant.group_size=64,100,128: quant.group_size: unknown key" in ran.err
    assert "quant=nf4,fp4 quant.group_size=100: quant.group_size: expected one of" in ran.err
    assert "this cannot be done, 2 problems:" in ran.err
    [offer] = [line for line in ran.err.splitlines() if "what makes sense" in line]
    commands = [c.split()[2:] for c in offer.partition("what makes sense: ")[2].split(" && ")]
    assert [c[-2:] for c in commands] == [
        ["quant=nf4,fp4", "quant.group_size=64,128"],
        ["tracking=none", "quant=int8"],
    ]
    assert not (tmp_path / "o").exists()
    for each in commands:  # what is offered works
        assert weightmill("run", *each).status == 0
    assert len(outputs(tmp_path / "o")) == 5


def test_two_jobs_of_one_output_are_refused(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("run", "-m", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=nf4,fp4")
    assert ran.status == 2
    assert f"{tmp_path / 'out'} is one output, and these are 2 jobs; give output.root={tmp_path / 'out'}" in ran.err
    assert "what makes sense" not in ran.err
    assert ran.err.count("output.path") == 1
    ran = weightmill("run", "-m", f"model.path={source}", f"output.path={tmp_path / 'out'},{tmp_path / 'b'}",
                     "quant=nf4,fp4")  # fmt: skip
    assert ran.status == 2
    assert "is also that of" in ran.err
    assert not (tmp_path / "out").exists()


def test_grids_hold_exactly_their_combinations() -> None:
    all_but_one = [{"a": a, "b": b} for a in "123" for b in "xyz" if (a, b) != ("2", "y")]
    found = grids(all_but_one)
    made = [{"a": a, "b": b} for grid in found for a in grid["a"] for b in grid["b"]]
    assert sorted(map(str, made)) == sorted(map(str, all_but_one))
    assert len(found) == 2


def test_a_command_takes_the_place_of_what_an_experiment_sweeps() -> None:
    request = Request(given=["experiment=x", "model.path=a b"], overrides=["++model.path='a b'"])
    assert command({"quant": ("nf4", "fp4")}, request) == (
        "weightmill run -m experiment=x 'model.path=a b' '~hydra.sweeper.params' quant=nf4,fp4"
    )


@pytest.mark.parametrize("name", ["four_bit_shootout", "mlx_ladder", "gguf_ladder", "loader_shootout"])
def test_an_experiment_describes_jobs(name: str) -> None:
    from jobs.cli.compose import take_apart
    from jobs.cli.multirun import sweep
    from jobs.cli.validation import check
    from jobs.spec.job import JobSpec

    found: list[Composed] = []

    def together(jobs: Any, searches: bool) -> list[float]:
        found.extend(jobs)
        return [0.0] * len(jobs)

    sweep("run", take_apart("run", JobSpec, ["-m", f"experiment={name}", "model=demo"]), together)
    assert len({job.name for job in found}) == len(found) >= 2
    for job in found:
        check(JobSpec, job.values)


def test_a_sweeper_gets_the_objective_of_each_job(source: Path, tmp_path: Path) -> None:
    from jobs.cli.compose import take_apart
    from jobs.orchestration.sweep import Sweep
    from jobs.spec.job import JobSpec

    arguments = ["-m", *given(source, tmp_path / "o", "quant=nf4,none", "tracking=none")]
    request = take_apart("run", JobSpec, [*arguments, "objective=[size/bits_per_weight,error/relative]"])
    under_way, found = Sweep(request), []
    honest = under_way.together

    def together(jobs: Any, searches: bool) -> Any:
        found.extend(honest(jobs, True))
        tried_again = [replace(job, number=job.number + len(jobs)) for job in jobs]
        assert honest(tried_again, True) == found
        return found

    from jobs.cli.multirun import sweep

    sweep("run", request, together)
    under_way.close()
    assert [p["jobs"] for p in under_way.said().document["passes"]] == [2]
    assert found[0][0] < 16.0
    assert found[0][1] > 0.05
    assert found[1] == (pytest.approx(16.0, abs=0.1), 0.0)


def test_many_jobs_in_one_go_lose_none_and_leave_nothing_open(source: Path, tmp_path: Path, weightmill: Any) -> None:
    from mlflow.tracking import MlflowClient

    root = tmp_path / "o"
    sweep = ["-m", f"model.path={source}", "quant=nf4,fp4", "tracking=mlflow"]
    assert weightmill("run", *sweep, f"output.root={tmp_path / 'first'}").status == 0
    sweep += ["quant.group_size=64,128"]
    before = open_files()
    ran = weightmill("run", *sweep, f"output.root={root}", "quant.double_quant=false,true", "format=json")
    assert ran.status == 0, ran.err
    assert len(ran.document["jobs"]) == len(outputs(root)) == 8
    assert open_files() < before + 8  # one store more, with a few connections: but nothing for each job
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("weightmill")
    found = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in found] == ["FINISHED"] * 9  # and the sweep's own
    assert len({run.data.tags["weightmill.sweep"] for run in found}) == 1
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]


def open_files() -> int:
    listed = Path("/proc/self/fd")
    return len(list(listed.iterdir())) if listed.exists() else 0
