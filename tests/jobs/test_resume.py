"""Crashes: whatever was finished stays, nothing half-written is ever seen, and the end is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import jobs.execution.unit
from jobs.output.journal import Journal, find_journals
from jobs.planning.plan import FORMAT
from tests.making import snapshot, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
REPORT = "weightmill.json"


def comparable(out: Path) -> tuple[dict[str, bytes], Any]:
    """An output without its declared timing fields (`run`)."""
    report = json.loads((out / REPORT).read_text())
    del report["run"]
    return snapshot(out, ignore=[REPORT]), report


def arguments(source: Path, out: Path) -> list[str]:
    return [f"model.path={source}", f"output.path={out}", "source.unit_mb=0.02", "quant.double_quant=true"]


@pytest.fixture
def undisturbed(source: Path, tmp_path: Path, weightmill: Any) -> tuple[dict[str, bytes], Any]:
    out = tmp_path / "undisturbed"
    assert weightmill("run", *arguments(source, out)).status == 0
    return comparable(out)


def test_a_job_goes_on_where_it_was(
    source: Path, tmp_path: Path, weightmill: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ran = tmp_path / "out", []
    honest = jobs.execution.unit.run_unit

    def failing(task: Any, on_bytes: Any, stop: Any) -> Any:
        ran.append(task.unit.id)
        if len(ran) == 4:
            raise ValueError("a bug")
        return honest(task, on_bytes, stop)

    monkeypatch.setattr(jobs.execution.unit, "run_unit", failing)
    with pytest.raises(ValueError, match="a bug"):
        weightmill("run", *arguments(source, out), "cluster.units_at_once=1")
    assert not out.exists()
    first, ran[:] = ran[:3], ["x"] * 4
    result = weightmill("run", *arguments(source, out))
    assert result.status == 0
    assert "3 of" in result.err
    assert not set(first) & set(ran[4:])
    assert comparable(out) == undisturbed
    assert find_journals(tmp_path) == []


def test_a_finished_part_that_was_damaged_since_is_made_again(
    source: Path, tmp_path: Path, weightmill: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def no(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", no)
        assert weightmill("run", *arguments(source, out)).status == 130
    [root] = find_journals(tmp_path)
    path = min((root / "files").iterdir())
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    result = weightmill("run", *arguments(source, out), "format=json")
    assert result.document["run"]["units_resumed"] == result.document["run"]["units"] - 1
    assert comparable(out) == undisturbed


def test_another_job_for_the_same_output_keeps_its_own_journal(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def no(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", no)
        assert weightmill("run", *arguments(source, out)).status == 130
    assert weightmill("run", *arguments(source, out), "quant=fp4").status == 0
    assert len(find_journals(tmp_path)) == 1


def test_two_processes_do_not_write_one_output(source: Path, tmp_path: Path, weightmill: Any) -> None:
    from jobs.cli.compose import compose, take_apart
    from jobs.orchestration.preflight import plan_job
    from jobs.spec.job import JobSpec

    given = arguments(source, tmp_path / "out")
    planned = plan_job(compose("run", JobSpec, take_apart("run", given)))
    with planned.journal.hold({}):
        ran = weightmill("run", *given)
    assert ran.status == 2
    assert f"pid {os.getpid()}" in ran.err


def test_a_journal_of_another_version_is_refused_with_a_sentence(source: Path, tmp_path: Path, weightmill: Any) -> None:
    from jobs.cli.compose import compose, take_apart
    from jobs.orchestration.preflight import plan_job
    from jobs.spec.job import JobSpec

    given = arguments(source, tmp_path / "out")
    journal = plan_job(compose("run", JobSpec, take_apart("run", given))).journal
    with journal.hold({}):
        pass
    (journal.root / "job.json").write_text(json.dumps({"format": FORMAT + 1}))
    ran = weightmill("run", *given)
    assert ran.status == 2
    assert f"is of format {FORMAT + 1}, this weightmill writes {FORMAT}" in ran.err
    (journal.root / "job.json").unlink()
    (journal.records / "unit-00001.json").write_text(json.dumps({"format": FORMAT + 1}))
    ran = weightmill("run", *given)
    assert ran.status == 1
    assert f"a record of format {FORMAT + 1}" in ran.err


def test_errors_that_may_pass_are_tried_again(
    source: Path, tmp_path: Path, weightmill: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loaders.errors import TransientIOError

    monkeypatch.setattr("jobs.execution.cluster.FIRST_PAUSE_S", 0.01)
    failed = []
    honest = jobs.execution.unit.run_unit

    def flaky(task: Any, on_bytes: Any, stop: Any) -> Any:
        if len(failed) < 2:
            failed.append(task.unit.id)
            raise TransientIOError("made up")
        return honest(task, on_bytes, stop)

    monkeypatch.setattr(jobs.execution.unit, "run_unit", flaky)
    ran = weightmill("run", *arguments(source, tmp_path / "out"), "format=json")
    assert ran.document["run"]["retries"] == 2
    assert comparable(tmp_path / "out") == undisturbed


def test_errors_that_do_not_pass_are_not_tried_again(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loaders.errors import StorageError

    calls = []

    def broken(task: Any, on_bytes: Any, stop: Any) -> Any:
        calls.append(task.unit.id)
        raise StorageError("made up")

    monkeypatch.setattr(jobs.execution.unit, "run_unit", broken)
    ran = weightmill("run", *arguments(source, tmp_path / "out"), "cluster.units_at_once=1")
    assert ran.status == 1
    assert "unit-00001: made up" in ran.err
    assert len(calls) <= 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "source"]


def test_a_kill_between_publishing_and_cleaning_up_is_finished_by_the_same_command(
    source: Path, tmp_path: Path, weightmill: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: None)
        assert weightmill("run", *arguments(source, out)).status == 0
    assert len(find_journals(tmp_path)) == 1
    ran = weightmill("run", *arguments(source, out))
    assert ran.status == 0
    assert "was published before the job was interrupted" in ran.err
    assert comparable(out) == undisturbed
    assert find_journals(tmp_path) == []
    assert weightmill("run", *arguments(source, out)).status == 2


def start(source: Path, out: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.run", "tracking=none", "cluster=local", *arguments(source, out), *extra]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_half_file_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    slow = (
        "import time, jobs.execution.unit as u; honest = u.run_unit\n"
        "def run(task, on_bytes, stop):\n"
        "    if task.unit.id > 'unit-00002': [time.sleep(0.1) for _ in range(100) if not stop.is_set()]\n"
        "    return honest(task, on_bytes, stop)\n"
        "u.run_unit = run\n"
        "import sys; from jobs.run import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", slow, "tracking=none", *arguments(source, tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    [records] = [None]
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = find_journals(tmp_path)
        if found and len(list((found[0] / "records").glob("*.json"))) == 2:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, (records, err)
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    [root] = find_journals(tmp_path)
    assert list((root / "parts").iterdir()) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "seed"), [("publish", 0), *(("units", n) for n in range(3)), *(("anywhere", n) for n in (3, 4))]
)
def test_killed_at_thirty_moments_the_output_is_the_same_and_no_finished_unit_runs_again(
    where: str, seed: int, source: Path, tmp_path: Path, undisturbed: Any
) -> None:
    """SIGKILL: fifteen between the first record and publishing, five inside publishing, ten anywhere."""
    rng = random.Random(seed)
    for number in range(5):
        out = tmp_path / f"out{number}"
        killed, mtimes = _kill_once(source, out, where, rng)
        process = start(source, out)
        _, err = process.communicate(timeout=600)
        # a kill in the last milliseconds of "anywhere" may find nothing left to do: then the output is refused as there
        assert process.returncode in ((0, 2) if where == "anywhere" else (0,)), (where, killed, err)
        assert comparable(out) == undisturbed, where
        report = json.loads((out / REPORT).read_text())
        for path, written in mtimes.items():
            assert report["run"]["units_resumed"] >= len(mtimes) or (out / path).stat().st_mtime_ns == written
        assert find_journals(tmp_path) == []


def _kill_once(source: Path, out: Path, where: str, rng: random.Random) -> tuple[bool, dict[str, int]]:
    """Kill a run at a random moment of a kind; whether it still lived, and the finished files it left."""
    slow = {
        "publish": "import jobs.output.publish as p, os; f = p.write_file\n"
        "def w(path, data): time.sleep(0.05); f(path, data)\n"
        "p.write_file = w\n",
        "units": "import jobs.output.journal as j; f = j.Journal.add\n"
        "def a(self, record): f(self, record); time.sleep(0.05)\n"
        "j.Journal.add = a\n",
        "anywhere": "",
    }[where]
    code = f"import time, sys\n{slow}from jobs.run import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "tracking=none", "cluster=local", *arguments(source, out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if where == "anywhere":
        time.sleep(rng.uniform(0.2, 3.0))
    else:
        _wait_for(process, out, where)
        time.sleep(rng.uniform(0.0, 0.2))
    lived = process.poll() is None
    process.kill()
    process.wait()
    found = [j for j in find_journals(out.parent) if j.name.startswith(f".{out.name}.")]
    finished = {}
    for journal in found:
        for record in (journal / "records").glob("*.json"):
            for file in (written["name"] for written in json.loads(record.read_text())["files"]):
                if (journal / "files" / file).exists():
                    finished[file] = (journal / "files" / file).stat().st_mtime_ns
    return lived, finished


def _wait_for(process: subprocess.Popen[Any], out: Path, where: str) -> None:
    """Until the first record is there, or publishing has begun."""
    while process.poll() is None:
        for journal in find_journals(out.parent):
            if not journal.name.startswith(f".{out.name}."):
                continue
            begun = (journal / "files" / "tokenizer.json").exists()
            if begun if where == "publish" else any((journal / "records").glob("*.json")):
                return
        time.sleep(0.005)
