"""`weightmill bench sweep`: both ways make the same, and the kernel is asked for the rate in its own words."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.benchmarks import disk_limit
from jobs.benchmarks.disk_limit import limited_reads
from loaders.errors import BadSpec
from tests.conftest import Ran


def test_a_sweep_is_timed_beside_its_jobs_and_makes_the_same(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    given = (f"model.path={source}", "quants=[nf4,mlx_int4]", "repeats=1", f"folder={tmp_path}", "format=json")
    ran = weightmill("bench", "sweep", *given)
    assert ran.status == 0, ran.err
    assert [row["case"] for row in ran.document["rows"]] == ["the sweep", "nf4", "mlx_int4"]
    assert ran.document["is_same"]
    assert ran.document["to_the_slowest"] > 0
    assert not list(tmp_path.glob("weightmill-bench-*"))
    one = weightmill("bench", "sweep", f"model.path={source}", "quants=[nf4]")
    assert one.status == 2
    assert "a sweep is of two or more" in one.err


@pytest.mark.parametrize("version", [1, 2])
def test_reads_are_limited_in_a_control_group(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_limit, "_disk", lambda path: "8:0")
    if version == 1:
        parent, setting, wanted, members = tmp_path / "blkio", "blkio.throttle.read_bps_device", "8:0 5000000", "tasks"
        parent.mkdir()
        (parent / setting).touch()
    else:
        parent, setting, wanted, members = tmp_path, "io.max", "8:0 rbps=5000000", "cgroup.procs"
        (tmp_path / "cgroup.controllers").write_text("cpu io memory")
    with limited_reads(tmp_path, 5_000_000, tmp_path) as within:
        [group] = parent.glob("weightmill-bench-*")
        assert (group / setting).read_text() == wanted
        said = subprocess.run([*within, "sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout
        assert (group / members).read_text() == said


def test_where_reads_cannot_be_limited_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_limit, "_disk", lambda path: "8:0")
    with pytest.raises(BadSpec, match="no io or blkio controller"), limited_reads(tmp_path, 1, tmp_path):
        pass
