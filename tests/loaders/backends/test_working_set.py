"""The memory that Kubernetes counts, from a cgroup of either version."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaders.backends import machine
from loaders.backends.memory import PeakMemory, memory_cgroup, working_set_bytes

pytestmark = pytest.mark.quick

POD = "kubepods/pod1/container1"


def second(folder: Path) -> None:
    """A cgroup of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.current").write_text("1000\n")
    (folder / "memory.stat").write_text("anon 300\nfile 700\ninactive_file 250\nactive_file 450\n")


def first(folder: Path) -> None:
    """A cgroup of version 1; its own inactive files are not those of the cgroups below it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.usage_in_bytes").write_text("1000\n")
    (folder / "memory.stat").write_text("inactive_file 10\ntotal_inactive_file 250\n")


def test_inactive_files_are_not_counted(tmp_path: Path) -> None:
    for at, make in enumerate((first, second)):
        make(tmp_path / str(at))
        assert working_set_bytes(tmp_path / str(at)) == 750
    (tmp_path / "0" / "memory.stat").write_text("total_inactive_file 2000\n")
    assert working_set_bytes(tmp_path / "0") == 0


@pytest.mark.parametrize("damage", ["", "words\n", "inactive_file\n", "inactive_file many\n"])
def test_what_cannot_be_read_is_not_known(damage: str, tmp_path: Path) -> None:
    second(tmp_path)
    (tmp_path / "memory.stat").write_text(damage)
    assert working_set_bytes(tmp_path) is None
    assert working_set_bytes(tmp_path / "none") is None
    assert working_set_bytes(None) is None


def own(folder: Path, text: str) -> Path:
    file = folder / "self"
    file.write_text(text)
    return file


def test_a_process_finds_its_cgroup_of_either_version(tmp_path: Path) -> None:
    second(tmp_path / "two" / POD)
    assert memory_cgroup(tmp_path / "two", own(tmp_path, f"0::/{POD}\n")) == tmp_path / "two" / POD
    first(tmp_path / "one" / "memory" / POD)
    lines = f"4:cpu,cpuacct:/other\n3:memory:/{POD}\n0::/\n"
    assert memory_cgroup(tmp_path / "one", own(tmp_path, lines)) == tmp_path / "one" / "memory" / POD


def test_in_a_container_the_root_that_it_sees_is_its_own(tmp_path: Path) -> None:
    first(tmp_path / "memory")
    assert memory_cgroup(tmp_path, own(tmp_path, f"3:memory:/{POD}\n")) == tmp_path / "memory"


def test_of_a_machine_without_containers_nothing_is_told(tmp_path: Path) -> None:
    first(tmp_path / "memory")
    (tmp_path / "memory" / "release_agent").touch()
    assert memory_cgroup(tmp_path, own(tmp_path, "3:memory:/\n")) is None
    assert memory_cgroup(tmp_path, own(tmp_path, "0::/\n")) is None
    assert memory_cgroup(tmp_path, tmp_path / "none") is None
    assert memory_cgroup(tmp_path, own(tmp_path, "no colons\n")) is None


def test_the_peak_is_what_was_there_at_the_end_at_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second(tmp_path)
    monkeypatch.setattr(PeakMemory, "_group", staticmethod(lambda: tmp_path))
    with PeakMemory() as memory:
        (tmp_path / "memory.current").write_text("5000\n")
    assert memory.peak_working_set_bytes == 4750
    monkeypatch.setattr(PeakMemory, "_group", staticmethod(lambda: None))
    with PeakMemory() as memory:
        pass
    assert memory.peak_working_set_bytes is None


@pytest.mark.parametrize(("limit", "is_contained"), [(1 << 30, True), (2**63 - 4096, False)])
def test_a_limit_beyond_all_memory_makes_no_container(
    limit: int, is_contained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(machine, "_limits", lambda: [(limit, 0)])
    assert machine.is_contained() == is_contained
