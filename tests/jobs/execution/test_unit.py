"""What a unit's task says of itself, by which it is placed and its machine asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.execution.unit import Share, UnitReport, UnitTask
from jobs.planning.build import make_plan
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import StorageError
from loaders.quantization.gate import Gate
from loaders.storage.address import Address
from loaders.strategies import LazyLoader
from tests.making import write_checkpoint
from tests.passes import target

pytestmark = pytest.mark.quick


def tasks(source: Path, out: str, preset: str, backend: str) -> list[UnitTask]:
    """The tasks of a job whose units have a tensor or two each."""
    planned = make_plan(open_checkpoint(source), [target(preset)], 0.01)
    made = []
    for unit in planned.units:
        share = Share(unit=unit, target=preset, output=Address.of(out), key="0" * 12, gate=Gate(allow_nonfinite=False),
                      backend=backend)  # fmt: skip
        made.append(
            UnitTask(unit=unit, source=Address.of(source), shares={"0": share}, strategy=LazyLoader(), threads=1)
        )
    return made


def test_a_unit_takes_a_gpu_only_if_one_of_its_tensors_is_encoded_there(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=1)
    by_gpu: dict[int, set[str]] = {0: set(), 1: set()}
    for task in tasks(source, str(tmp_path / "out"), "nf4", "cuda"):
        encodings = [p.encoding for p in task.unit.outputs["nf4"].placements]
        by_gpu[task.gpus] |= {"quantize" if "quantize" in {e.action for e in encodings} else "keep"}
        assert ("cuda" in task.backends) == bool(task.gpus)
    assert by_gpu == {0: {"keep"}, 1: {"quantize"}}
    assert {task.gpus for task in tasks(source, str(tmp_path / "out"), "nf4", "cpu")} == {0}


def test_a_task_says_where_it_writes_and_whether_its_cpu_matters(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=1)
    local = tasks(source, str(tmp_path / "out"), "nf4", "cpu")[0]
    assert [journal.output for journal in local.journals] == [Address.of(tmp_path / "out")]
    assert local.scratch_bytes == 0
    assert not local.by_architecture
    away = tasks(source, "s3://bucket/out", "hqq4", "cpu")
    assert all(task.scratch_bytes > 0 for task in away)
    assert any(task.by_architecture for task in away)


def _attempt(task: UnitTask, meanwhile: Callable[[], object]) -> UnitReport:
    """Run a unit, in whose middle something happens."""
    happens = [meanwhile]

    def count(size: int) -> None:
        while happens:
            happens.pop()()

    return task.run(count, threading.Event())


def test_an_attempt_that_is_late_takes_the_record_of_the_first(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=1)
    task = tasks(source, str(tmp_path / "out"), "nf4", "cpu")[0]
    [journal] = task.journals
    journal.destination.prepare(overwrite=False)
    first: list[UnitReport] = []
    late = _attempt(task, lambda: first.append(_attempt(task, lambda: None)))
    assert late.done == first[0].done
    root = journal.destination.root  # type: ignore[attr-defined]
    [record] = (root / "records").iterdir()
    assert journal.record(task.unit).done == late.done["0"]  # type: ignore[union-attr]
    assert list((root / "parts").iterdir()) == []
    before = record.read_bytes()
    again = _attempt(task, lambda: None)  # as of a rerun that does not trust the record
    assert [file.xxh3 for file in again.done["0"].files] == [file.xxh3 for file in late.done["0"].files]
    assert record.read_bytes() != before


def test_an_attempt_that_is_late_for_its_job_leaves_nothing(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=1)
    task = tasks(source, str(tmp_path / "out"), "nf4", "cpu")[0]
    [journal] = task.journals
    journal.destination.prepare(overwrite=False)
    with pytest.raises(StorageError, match="not found on"):
        _attempt(task, journal.remove)
    journal.destination.prepare(overwrite=False)
    _attempt(task, lambda: None)
    found = journal.record(task.unit)
    assert found is not None
    journal.remove()
    with pytest.raises(StorageError, match="No such file"):
        journal.add(found)
    assert [each.name for each in tmp_path.iterdir()] == ["source"]
