"""What happens to the processes that run units."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from tests.cluster import hosts
from tests.cluster.cluster import Cluster, Job, wait_for
from tests.cluster.conftest import Case
from tests.cluster.hosts import Host, Process

pytestmark = pytest.mark.cluster


def a_worker(job: Job, host: Host | None = None) -> tuple[str, Host, Process]:
    return wait_for(lambda: job.cluster.at_work(job.out, host), 120, f"for a worker: {job.said}")[0]


def test_nothing(case: Case) -> None:
    """nothing"""
    ended = case.is_done(case.job())
    case.row(ended, ", ".join(f"{units} units on {host}" for host, units in ended.hosts.items()))
    assert sorted(ended.hosts) == ["host1", "host2", "host3"]


def test_code_is_sent_along(case: Case) -> None:
    """nothing; weightmill is sent along, and compiled there"""
    cluster = case.cluster
    ended = case.is_done(case.job("cluster=ray", f"cluster.address={cluster.address}"))
    assert sorted(ended.hosts) == ["host1", "host2", "host3"]


def test_a_worker_is_killed(case: Case) -> None:
    """a worker process is killed"""
    job = case.job()
    job.wait_for_units(4)
    a_worker(job)[2].kill()
    case.is_done(job, "its unit is done again")


def test_the_same_unit_is_killed_again_and_again(case: Case) -> None:
    """the same unit's worker is killed each time"""
    job = case.job()
    job.wait_for_units(4)
    unit, _, process = a_worker(job)
    killed: set[int] = {process.number}

    def kill() -> None:
        while job.is_running:
            for name, _, process in job.cluster.at_work(job.out):
                if name == unit:
                    process.kill()
                    killed.add(process.number)
            time.sleep(0.02)

    process.kill()
    thread = threading.Thread(target=kill)
    thread.start()
    ended = case.has_failed(job, 1, unit, remark="given up with the unit's name; the rerun goes on")
    thread.join()
    assert 4 <= len(killed) <= 8  # three retries, and perhaps copies of a straggler
    assert ended.said.count("failed:") == 1
    case.resumes(job, units=4)


@pytest.mark.parametrize("where", ["the driver's host", "another host"])
def test_a_worker_is_frozen(where: str, case: Case) -> None:
    """a worker process is frozen for good (SIGSTOP), on {}"""
    job = case.job()
    job.wait_for_units(4)
    host = case.cluster.hosts[0 if where == "the driver's host" else 2]
    frozen = a_worker(job, host)[2]
    frozen.kill(signal.SIGSTOP)
    case.is_done(job, "its unit is done elsewhere")
    wait_for(lambda: frozen.number not in [p.number for p in host.processes], 15, "the frozen process is left")


def test_raylet_is_killed(case: Case) -> None:
    """a raylet is killed"""
    job = case.job()
    job.wait_for_units(4)
    for process in case.cluster.hosts[1].processes:
        if "raylet/raylet" in process.command:
            process.kill()
    case.cluster.hosts[1].is_disturbed = True
    case.is_done(job)


HOG = "import sys, time; held = bytearray(b'x') * (int(sys.argv[1]) << 20); print('held', flush=True); time.sleep(600)"


def test_memory_beside_a_unit(case: Case, clusters: Callable[..., Cluster]) -> None:
    """a host's memory is taken by another program"""
    if not hosts.can_limit("memory"):
        pytest.skip("the memory of a host is limited by a cgroup of version 1, which is not here")
    cluster = clusters(memory_mb={2: 1500})
    job = case.job(on=cluster)
    a_worker(job, cluster.hosts[1])
    used = int((hosts.CGROUPS / "memory" / f"{cluster.network.id}-host2" / "memory.usage_in_bytes").read_text()) >> 20
    anonymous = used // 2  # the rest is files, which go when memory is short
    hog = cluster.hosts[1].start(sys.executable, "-c", HOG, str(1440 - anonymous))
    try:
        case.is_done(job)
    finally:
        hog.kill()
        hog.wait()
