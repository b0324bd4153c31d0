"""What happens to hosts and their cables, but the head's."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.cluster import hosts
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import Case

pytestmark = pytest.mark.cluster
DEAD_S = 25  # after which a host that does not answer is surely called dead: three questions, see HEALTH


@pytest.fixture(params=[1, 2], ids=["a host", "two of three hosts"])
def fallen(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_hosts_lose_power(fallen: int, case: Case) -> None:
    """{}: power off"""
    job = case.job()
    job.wait_for_units(5)
    for host in case.cluster.hosts[-fallen:]:
        host.off()
    case.is_done(job)


def test_a_host_is_frozen(case: Case) -> None:
    """a host is frozen for good"""
    job = case.job()
    job.wait_for_units(5)
    case.cluster.hosts[2].freeze()
    case.is_done(job)


def test_a_cable_is_pulled(case: Case, clusters: Callable[..., Cluster]) -> None:
    """a cable is pulled for good, Ray's health checks as they come"""
    cluster = clusters(settings={})
    job = case.job(on=cluster)
    job.wait_for_units(5)
    cluster.hosts[2].unplug()
    case.is_done(job)


@pytest.mark.parametrize("after_s", [4, DEAD_S], ids=["before", "after"])
def test_a_cable_is_pulled_and_plugged(after_s: float, case: Case) -> None:
    """a cable is pulled and plugged in again, {} the host is called dead"""
    job = case.job()
    job.wait_for_units(5)
    host = case.cluster.hosts[2]
    host.unplug()
    time.sleep(after_s)
    host.plug()
    case.is_done(job)


def test_a_host_is_frozen_for_a_while(case: Case) -> None:
    """a host is frozen for 5 s"""
    job = case.job()
    job.wait_for_units(5)
    host = case.cluster.hosts[2]
    host.freeze()
    time.sleep(5)
    host.thaw()
    case.is_done(job)


def test_a_host_joins_late(case: Case) -> None:
    """a host joins while the job runs"""
    cluster = case.cluster
    cluster.hosts[2].off()
    time.sleep(3)
    cluster.hosts[2].boot()
    try:
        job = case.job()
        job.wait_for_units(2)
        for host in cluster.hosts[:2]:
            host.limit(0.1)
        cluster.join(cluster.hosts[2])
        job.wait_for_units(1, by=cluster.hosts[2])
        for host in cluster.hosts[:2]:
            host.limit(None)
        ended = case.is_done(job)
    finally:
        for host in cluster.hosts:
            host.limit(None)
    assert ended.hosts.get("host3"), ended.hosts
    case.row(ended, f"{ended.hosts['host3']} of its units are done there")


def test_a_host_comes_back(case: Case) -> None:
    """a host loses power, is repaired and joins again"""
    cluster = case.cluster
    for host in cluster.hosts[:2]:
        host.limit(0.4)
    try:
        job = case.job()
        job.wait_for_units(2)
        cluster.hosts[2].off()
        cluster.hosts[2].boot()
        cluster.join(cluster.hosts[2])
        case.is_done(job)
    finally:
        for host in cluster.hosts:
            host.limit(None)


def test_a_host_is_drained(case: Case) -> None:
    """a host gets notice (ray drain-node), and goes"""
    cluster = case.cluster
    node = cluster.node(cluster.hosts[2])
    job = case.job()
    job.wait_for_units(5)
    cluster.hosts[0].run(
        "ray", "drain-node", f"--address={cluster.address}", f"--node-id={node}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=8",
    )  # fmt: skip
    cluster.hosts[2].is_disturbed = True
    case.is_done(job)


def test_a_host_is_slow(case: Case, clusters: Callable[..., Cluster]) -> None:
    """a host is ten times slower"""
    if not hosts.can_limit("cpu"):
        pytest.skip("the CPUs of a host are limited by a cgroup of version 1, which is not here")
    cluster = case.cluster
    job = case.job()
    job.wait_for_units(1)
    cluster.hosts[2].limit(0.05)
    try:
        case.is_done(job)
    finally:
        cluster.hosts[2].limit(None)
