"""What a process may use of its machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaders.backends import backend, machine


def test_the_cpu_says_what_it_may_use() -> None:
    found = backend("cpu")
    assert (found.name, found.device) == ("cpu", "cpu")
    assert 0 < found.free_bytes <= found.total_bytes
    assert machine.usable_cpus() >= 1


@pytest.mark.quick
def test_quotas_of_containers_count(tmp_path: Path) -> None:
    assert machine.usable_cpus(tmp_path) >= 1
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert machine.usable_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    free = machine.usable_cpus(tmp_path)
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    assert machine.usable_cpus(tmp_path) == 1 <= free


@pytest.mark.quick
def test_limits_of_containers_leave_out_what_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 100\nfile 600\n")
    assert machine._limits(tmp_path) == [(1000, 100)]
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._limits(tmp_path) == []
