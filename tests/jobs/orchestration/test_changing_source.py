"""A source that changes while the job runs: the job fails by name, and what it made of the old files is made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jobs.execution.unit
import jobs.orchestration.job
from loaders.checkpoints.checkpoint import open_checkpoint
from tests.making import snapshot

Change = Callable[[Path], None]


def other_bytes(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    return bytes(data)


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(other_bytes(path))
    new.replace(path)


def rewrite(path: Path) -> None:
    data = other_bytes(path)
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))  # on a coarse clock both writes may have one time


def replace_unseen(path: Path) -> None:
    times = path.stat()
    replace(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def rewrite_unseen(path: Path) -> None:
    times = path.stat()
    path.write_bytes(other_bytes(path))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def given(source: Path, out: Path) -> list[str]:
    return [
        f"model.path={source}", f"output.path={out}", "quant=nf4", "unit_mb=0.02", "cluster.units_at_once=1",
        "tracking=none",
    ]  # fmt: skip


def after(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[Any], None]) -> list[Any]:
    """Act once, after `count` units; returns the units that are run from now on."""
    honest, ran = jobs.execution.unit.run_unit, list[Any]()

    def watched(task: Any, on_bytes: Any, stop: Any) -> Any:
        done = honest(task, on_bytes, stop)
        ran.append(task.unit)
        if len(ran) == count:
            act(task)
        return done

    monkeypatch.setattr(jobs.execution.unit, "run_unit", watched)
    return ran


@pytest.mark.quick
@pytest.mark.parametrize("change", [replace, rewrite, replace_unseen, rewrite_unseen, cut])
def test_a_file_of_finished_units_that_changes_fails_the_job_by_name(
    change: Change, source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, changed = tmp_path / "out", list[str]()

    def act(task: Any) -> None:
        changed.append(task.unit.sources[0].name)
        change(source / changed[0])

    ran = after(monkeypatch, 2, act)
    said = weightmill("run", *given(source, out))
    assert said.status == 1
    assert f"{changed[0]}: it changed while it was read" in said.err
    assert "Traceback" not in said.err
    assert not out.exists()
    if change is cut:  # what is left is no checkpoint
        return
    # Of the units that were done, those of other files are not done again.
    names = {unit.id: {entry.name for entry in unit.sources} for unit in ran}
    first, ran[:] = [unit.id for unit in ran], [None] * 9
    assert weightmill("run", *given(source, out)).status == 0
    again = {unit.id for unit in ran[9:]} & {*first}
    assert {unit for unit in first[:2] if changed[0] in names[unit]} <= again
    assert all(changed[0] in names[unit] for unit in again & {*first[:2]})
    monkeypatch.undo()
    assert weightmill("run", *given(source, tmp_path / "plain")).status == 0
    ignore = ["weightmill.json", "README.md"]
    assert snapshot(out, ignore=ignore) == snapshot(tmp_path / "plain", ignore=ignore)
    assert weightmill("verify", f"output.path={out}").status == 0


@pytest.mark.quick
@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_changes_when_all_units_are_done_fails_the_job(
    name: str, source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (source / name).exists(), sorted(p.name for p in source.iterdir())
    honest = jobs.orchestration.job.make_report

    def late(*arguments: Any) -> Any:
        replace(source / name)
        return honest(*arguments)

    monkeypatch.setattr(jobs.orchestration.job, "make_report", late)
    said = weightmill("run", *given(source, tmp_path / "out"))
    assert said.status == 1
    assert f"{name}: it changed while it was read" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
def test_a_copy_of_the_source_is_another_request_and_no_error(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    after(monkeypatch, 2, fail)
    assert weightmill("run", *given(source, out)).status not in (0, 2)
    monkeypatch.undo()
    shutil.copytree(source, tmp_path / "copy")  # the times of change are kept, as by cp -a
    shutil.rmtree(source)
    (tmp_path / "copy").rename(source)
    ran = weightmill("run", *given(source, out))
    assert ran.status == 0, ran.err
    assert weightmill("verify", f"output.path={out}").status == 0


@pytest.mark.quick
@pytest.mark.parametrize("touch", [lambda path: None, Path.read_bytes, Path.stat])
def test_a_source_that_is_read_by_others_has_not_changed(source: Path, touch: Change) -> None:
    checkpoint = open_checkpoint(source)
    for entry in checkpoint.files:
        touch(source / entry.name)
    checkpoint.check_unchanged()
