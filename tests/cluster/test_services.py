"""Jobs that need others while they run: an MLflow server, a store of objects."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster import buckets
from tests.cluster.cluster import Cluster, hashed, wait_for
from tests.cluster.conftest import Case
from tests.cluster.hosts import SERVER

pytestmark = pytest.mark.cluster


def _at_switch(cluster: Cluster, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        cluster.network.at_switch(sys.executable, *arguments), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _track(folder: Path, cluster: Cluster) -> tuple[subprocess.Popen[str], str]:
    server = _at_switch(cluster, "-m", "tests.tracking_server", folder, SERVER)
    assert server.stdout is not None
    return server, server.stdout.readline().strip()


def test_the_tracking_server_goes(case: Case) -> None:
    """the MLflow server is gone in the middle"""
    folder = case.out.parent.parent / "mlflow"
    folder.mkdir(parents=True)
    server, address = _track(folder, case.cluster)
    assert address
    settings = ("tracking=mlflow", f"tracking.uri=http://{address}")
    job = case.job(*settings)
    job.wait_for_units(5)
    server.kill()
    server.wait()
    ended = case.is_done(job, "`weightmill track` sends the numbers later")
    assert "weightmill track" in ended.said
    server, address = _track(folder, case.cluster)
    try:
        host = case.cluster.hosts[0]
        for _ in range(2):  # the second time is harmless
            host.run(sys.executable, "-m", "jobs.track", case.out, f"tracking.uri=http://{address}")
        asks = (
            "import json, sys, urllib.request as u; asked = json.dumps({'experiment_ids': [str(i) for i in range(9)]});"
            " to = sys.argv[1] + '/api/2.0/mlflow/runs/search';"
            " print(u.urlopen(u.Request(to, asked.encode(), {'Content-Type': 'application/json'})).read().decode())"
        )
        found = json.loads(host.run(sys.executable, "-c", asks, f"http://{address}"))
        [run] = found["runs"]
        metrics = {each["key"] for each in run["data"]["metrics"]}
        assert "size/bits_per_weight" in metrics
        assert run["info"]["status"] == "FINISHED"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(case: Case) -> Iterator[Cluster]:
    """The cluster, and an empty bucket that its hosts reach."""
    pytest.importorskip("moto", reason="moto[server], which imitates S3, is not installed")
    server = _at_switch(case.cluster, "-m", "tests.cluster.buckets", "serve")
    assert server.stdout is not None
    assert server.stdout.readline().strip() == "ready"
    yield case.cluster
    server.kill()
    server.wait()


def test_a_bucket_and_a_host_that_is_off(case: Case, bucket: Cluster) -> None:
    """the output is in S3, and a host loses power"""
    here = case.out.parent.parent / "fetched"
    job = case.job(to=f"s3://{buckets.BUCKET}/made/out")
    wait_for(lambda: "%" in job.said or not job.is_running, 60, job.said)
    wait_for(lambda: len({host.name for host, _ in bucket.workers}) > 1 or not job.is_running, 60, job.said)
    time.sleep(1.5)
    bucket.hosts[2].off()
    ended = job.end(200)
    fetched = _at_switch(bucket, "-m", "tests.cluster.buckets", "fetch", "made", here)
    fetched.wait(60)
    ended = replace(ended, outputs=hashed(here))
    case.row(ended)
    assert ended.status == 0, ended.said
    assert case.bytes_of(ended) == "same"
    assert [path.name for path in here.iterdir()] == ["out"]
    case.is_clean(job, ended)
