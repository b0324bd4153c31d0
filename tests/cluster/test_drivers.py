"""What happens to the head, to drivers, and between jobs."""

from __future__ import annotations

import signal
import time

import pytest

from tests.cluster.cluster import wait_for
from tests.cluster.conftest import Case

pytestmark = pytest.mark.cluster


def test_the_head_is_off(case: Case) -> None:
    """the head loses power"""
    cluster = case.cluster
    job = case.job(host=cluster.hosts[1])
    job.wait_for_units(8)
    off = time.monotonic()
    cluster.hosts[0].off()
    ended = case.has_failed(
        job, 1, "failed:", f"{cluster.address.partition(':')[0]}", "of 27 units are done", for_s=120
    )
    known_s = time.monotonic() - off
    case.row(ended, f"said in a line after {known_s:.0f} s; the rerun goes on")
    assert known_s <= 60
    case.resumes(job, units=8)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGHUP, 130)],
    ids=["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"],
)
def test_the_driver_is_stopped(number: signal.Signals, status: int, case: Case) -> None:
    """the driver gets {}"""
    job = case.job()
    job.wait_for_units(8)
    job.send(number)
    case.has_failed(job, status, remark="the rerun goes on", for_s=40)
    if number != signal.SIGKILL:
        [journal] = case.cluster.network.seen(case.out.parent).glob(".out*")
        assert list((journal / "parts").iterdir()) == []
    case.resumes(job, units=8)


def test_a_driver_that_started_ray_is_killed(case: Case) -> None:
    """the driver that started Ray itself gets SIGKILL"""
    host = case.cluster.add(9)
    try:
        job = case.job("cluster=ray", "cluster.threads=1", host=host)
        job.wait_for_units(4)
        job.send(signal.SIGKILL)
        ended = job.end(20)
        case.row(ended, "Ray is gone within 10 s")
        assert ended.status == -9
        wait_for(lambda: not host.processes, 10, f"left: {[process.command[:80] for process in host.processes]}")
    finally:
        case.cluster.remove(host)


def test_two_jobs_at_once(case: Case) -> None:
    """two jobs at once"""
    other = case.job(out=case.out.parent.parent / "other" / "out")
    case.is_done(case.job())
    ended = other.end()
    assert ended.status == 0, ended.said
    assert case.bytes_of(ended) == "same"
    assert ended.left == ()


def test_two_drivers_for_one_output(case: Case) -> None:
    """a second driver for the same output, on another host"""
    job = case.job()
    journals = case.cluster.network.seen(case.out.parent)
    wait_for(lambda: list(journals.glob(".out*/lock")), 60, "the first has the output")
    second = case.job(host=case.cluster.hosts[1]).end(60)
    case.is_done(job, f"the second: {second.status}")
    assert second.status == 2, second.said
    assert "another process" in second.said
    assert second.foreign == []


def test_a_driver_is_killed_and_another_begins(case: Case) -> None:
    """the driver gets SIGKILL, and the job is run again from another host at once"""
    job = case.job()
    job.wait_for_units(8)
    job.send(signal.SIGKILL)
    job.end(20)
    case.is_done(case.job(host=case.cluster.hosts[1]), "goes on where it was")
