"""What hosts see of the source and of the output, and what is installed there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Job
from tests.cluster.conftest import Case
from tests.cluster.hosts import Host
from tests.cluster.model import write_model

pytestmark = pytest.mark.cluster


def is_left_out(case: Case, job: Job, host: Host, remark: str = "left out by name") -> None:
    """The job is done without a host, which it named once."""
    ended = case.is_done(job, remark)
    assert host.name not in ended.hosts
    [line] = [line for line in ended.said.splitlines() if "left out" in line]
    assert line.startswith(host.name)


def test_the_source_is_replaced(case: Case) -> None:
    """the source is replaced while the job runs"""
    source = case.out.parent.parent / "source"
    shutil.copytree(case.model, source)
    other = write_model(case.out.parent.parent / "other", seed=1)
    job = case.job(source=source)
    job.wait_for_units(5)
    for path in sorted(other.glob("*.safetensors")):
        path.replace(source / path.name)
    case.has_failed(job, 1, "failed:", "changed", remark="the file is named")


def test_a_host_without_the_source(case: Case) -> None:
    """a host does not see the source"""
    host = case.cluster.hosts[2]
    host.hide(case.model)
    is_left_out(case, case.job(), host)


def test_no_host_sees_the_source(case: Case) -> None:
    """no host sees the source, but the driver's, which has no CPUs for units"""
    outside = case.cluster.add(9)
    try:
        case.cluster.join(outside, cpus=0)
        for host in case.cluster.hosts[:3]:
            host.hide(case.model)
        case.has_failed(case.job(host=outside), 1, "failed: cluster: no machine", remark="refused in a line", for_s=60)
    finally:
        case.cluster.remove(outside)


def test_the_source_vanishes(case: Case) -> None:
    """a host loses sight of the source while the job runs"""
    host, job = case.cluster.hosts[2], case.job()
    job.wait_for_units(5)
    host.hide(case.model)
    case.is_done(job, "left out from then on")
    assert "host3" in job.said


def test_another_source(case: Case) -> None:
    """the source differs on one host, in bytes alone"""
    host = case.cluster.hosts[2]
    other = write_model(case.out.parent.parent / "other", seed=1)
    host.show(other, case.model)
    is_left_out(case, case.job(), host)


@pytest.mark.parametrize("what", ["another folder", "read-only"])
def test_the_output_of_a_host(what: str, case: Case) -> None:
    """the output's folder is {} on one host"""
    host, folder = case.cluster.hosts[2], case.out.parent
    folder.mkdir(parents=True)
    if what == "read-only":
        host.make_read_only(folder)
    else:
        host.hide(folder)
    is_left_out(case, case.job(), host)


def test_the_output_becomes_read_only(case: Case) -> None:
    """the output's folder becomes read-only on one host while the job runs"""
    host, job = case.cluster.hosts[2], case.job()
    job.wait_for_units(5)
    host.make_read_only(case.out.parent)
    case.is_done(job, "left out from then on")
    assert "host3" in job.said


def test_the_disk_fills_up(case: Case) -> None:
    """the disk is full in the middle; then there is room"""
    network = case.cluster.network
    network.resize_disk(900)
    out = network.disk / "full" / "out"
    try:
        job = case.job(out=out)
        job.wait_for_units(5)
        network.resize_disk((shutil.disk_usage(network.seen(network.disk)).used >> 20) + 30)
        case.has_failed(job, 1, "failed:", "No space left", remark="the rerun goes on")
        network.resize_disk(900)
        again = case.job(out=out)
        case.is_done(again)
    finally:
        shutil.rmtree(network.seen(out.parent))


@pytest.mark.parametrize("library", ["numba", "numpy"])
def test_another_version(library: str, case: Case) -> None:
    """a host has another version of {}"""
    host = case.cluster.hosts[2]
    _fake_version(host, library, case.out.parent.parent)
    if library == "numba":
        is_left_out(case, case.job(), host)
    else:
        case.is_done(case.job())
    assert case.cluster


def _fake_version(host: Host, library: str, folder: Path) -> None:
    """Let a host see the files of a library in another minor version: it says so, and its metadata."""
    from importlib.metadata import distribution, version

    here, found = distribution(library), version(library)
    parts = found.split(".")
    faked = ".".join([parts[0], str(int(parts[1]) + 1), *parts[2:]])
    folder.mkdir(parents=True, exist_ok=True)
    for name in (f"{library}/_version.py", f"{library}/version.py", f"{library}-{found}.dist-info/METADATA"):
        path = Path(str(here.locate_file(name)))
        if path.exists():
            copy = folder / f"{library}-{path.name}"
            copy.write_text(path.read_text().replace(found, faked))
            host.show(copy, path)


# In the place of Python's own: workers say that they run in another version. Ray itself refuses hosts that are one.
PYTHON = """
import platform, sys
if any("default_worker" in word for word in sys.orig_argv):
    platform.python_version = lambda: "3.99.0"
"""


def test_another_python(case: Case) -> None:
    """a host has another version of Python"""
    cluster: Cluster = case.cluster
    host = cluster.hosts[2]
    host.off()
    host.boot()
    site = case.out.parent.parent / "site"
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(PYTHON)
    cluster.join(host, environment={"PYTHONPATH": f"{site}:{host.environment['PYTHONPATH']}"})
    host.is_disturbed = True
    is_left_out(case, case.job(), host)
