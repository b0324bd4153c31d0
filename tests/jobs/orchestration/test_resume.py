"""Crashes: whatever was finished stays, nothing half-written is ever seen, and the end is the same."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import jobs.execution.unit
from jobs.output.journal import Journal, record_from
from jobs.planning.plan import FORMAT
from loaders.storage.hashes import sealed
from tests.failing import fail_at
from tests.journals import find_journals
from tests.making import snapshot, write_checkpoint
from tests.processes import start

REPORT = "weightmill.json"


def comparable(out: Path) -> tuple[dict[str, bytes], Any]:
    """An output without its declared timing fields (`run`)."""
    report = json.loads((out / REPORT).read_text())
    del report["run"]
    return snapshot(out, ignore=[REPORT]), report


def arguments(source: Path, out: Path) -> list[str]:
    return [f"model.path={source}", f"output.path={out}", "unit_mb=0.02", "quant.double_quant=true"]


@pytest.fixture
def undisturbed(source: Path, tmp_path: Path, weightmill: Any) -> tuple[dict[str, bytes], Any]:
    out = tmp_path / "undisturbed"
    assert weightmill("run", *arguments(source, out)).status == 0
    return comparable(out)


@pytest.mark.quick
def test_a_job_goes_on_where_it_was(
    source: Path, tmp_path: Path, weightmill: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    ran = fail_at(monkeypatch, 4)
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
    planned = plan_job(compose("run", JobSpec, take_apart("run", JobSpec, given)))
    with planned.journal.hold({}, overwrite=False):
        ran = weightmill("run", *given)
    assert ran.status == 2
    assert f"pid {os.getpid()}" in ran.err


def test_a_journal_of_another_version_is_refused_with_a_sentence(source: Path, tmp_path: Path, weightmill: Any) -> None:
    from jobs.cli.compose import compose, take_apart
    from jobs.orchestration.preflight import plan_job
    from jobs.spec.job import JobSpec

    given = arguments(source, tmp_path / "out")
    journal = plan_job(compose("run", JobSpec, take_apart("run", JobSpec, given))).journal
    with journal.hold({}, overwrite=False):
        pass
    (journal.destination.root / "job.json").write_bytes(sealed(json.dumps({"format": FORMAT + 1}).encode()))
    ran = weightmill("run", *given)
    assert ran.status == 2
    assert f"is of format {FORMAT + 1}, this weightmill writes {FORMAT}" in ran.err


def test_a_request_that_is_damaged_has_no_version(source: Path, tmp_path: Path, weightmill: Any) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", no)
        assert weightmill("run", *arguments(source, tmp_path / "out")).status == 130
    [root] = find_journals(tmp_path)
    path = root / "job.json"
    path.write_bytes(path.read_bytes().replace(b'"format"', b'"formau"', 1))
    assert weightmill("run", *arguments(source, tmp_path / "out")).status == 0


@pytest.mark.quick
def test_a_damaged_record_is_no_record(
    source: Path, tmp_path: Path, weightmill: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", no)
        assert weightmill("run", *arguments(source, out)).status == 130
    [root] = find_journals(tmp_path)
    first, second, third, *_ = sorted((root / "records").iterdir())
    raw = first.read_bytes()
    assert record_from(raw) is not None
    for at in range(len(raw)):
        assert record_from(raw[:at] + bytes([raw[at] ^ 1 << (at % 8)]) + raw[at + 1 :]) is None, at
    first.write_bytes(raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])
    second.write_bytes(b"")
    third.write_bytes(json.dumps({"format": FORMAT + 1}).encode())
    ran = fail_at(monkeypatch, -1)
    said = weightmill("run", *arguments(source, out))
    assert said.status == 0, said.err
    assert sorted(ran) == [path.stem for path in (first, second, third)]
    for path in (first, second, third):
        assert f"{path}: it is damaged, or of another version; {path.stem} is done again" in said.err
    assert comparable(out) == undisturbed


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
    assert "done already" in weightmill("run", *arguments(source, out)).out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
    process = start("-c", slow, "tracking=none", *arguments(source, tmp_path / "out"))
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


def test_an_interrupt_that_a_shell_in_the_background_ignores_stays_ignored(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = jobs.execution.unit.run_unit

    def interrupting(task: Any, on_bytes: Any, stop: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return honest(task, on_bytes, stop)

    monkeypatch.setattr(jobs.execution.unit, "run_unit", interrupting)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ran = weightmill("run", *arguments(source, tmp_path / "out"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran.status == 0, ran.err


@pytest.mark.slow
@pytest.mark.parametrize(("moments", "count"), [("changes", 20), ("times", 10)])
def test_killed_at_thirty_moments_the_output_is_the_same_and_no_finished_unit_runs_again(
    moments: str, count: int, source: Path, tmp_path: Path, weightmill: Any
) -> None:
    """SIGKILL: before changes to the disk, from the first to the last; and at any time. See killing.py."""
    made = tmp_path / "made"
    given = [each for each in arguments(source, made) if not each.startswith("output.path=")]
    process = start("-m", "tests.jobs.orchestration.killing", moments, str(count), str(made), "tracking=none",
                    "cluster=local", *given)  # fmt: skip
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    wanted, stages = comparable(made / "whole"), set()
    for number in range(count):
        out = made / str(number)
        journals = [j for j in find_journals(made) if j.name.startswith(f".{number}.")]
        finished = {file: mtime for journal in journals for file, mtime in finished_files(journal).items()}
        is_over = out.exists() and not journals  # it was killed when nothing was left to do
        stages.add((out.exists(), bool(finished), is_over))
        ran = weightmill("run", *arguments(source, out))
        assert ran.status == 0, (number, ran.err)
        assert ("done already" in ran.out) == is_over, (number, ran.out)
        assert comparable(out) == wanted, number
        resumed = json.loads((out / REPORT).read_text())["run"]["units_resumed"]
        assert all(resumed >= len(finished) or (out / f).stat().st_mtime_ns == at for f, at in finished.items())
    assert find_journals(made) == []
    if moments == "changes":
        assert {found for _, found, _ in stages} == {True, False}, (
            "no kill before, or none after the first unit was done"
        )


def finished_files(journal: Path) -> dict[str, int]:
    """Files that the records of a job's journal name, and when they were written."""
    names = [file["name"] for record in (journal / "records").glob("*.json")
             for file in json.loads(record.read_text())["content"]["files"]]  # fmt: skip
    return {n: (journal / "files" / n).stat().st_mtime_ns for n in names if (journal / "files" / n).exists()}
