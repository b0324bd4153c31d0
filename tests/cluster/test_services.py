"""Jobs that need others while they run: an MLflow server, a store of objects."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster import buckets
from tests.cluster.cluster import Cluster, hashed, wait_for
from tests.cluster.conftest import Case
from tests.cluster.hosts import SERVER

pytestmark = pytest.mark.cluster


@contextmanager
def serving(cluster: Cluster, *arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server of Python's where all hosts reach it; yields its process and the first line that it prints."""
    command = cluster.network.at_switch(sys.executable, *arguments)
    with subprocess.Popen(
        command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None
        try:
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


def test_the_tracking_server_goes(case: Case) -> None:
    """the MLflow server is gone in the middle"""
    folder = case.out.parent.parent / "mlflow"
    folder.mkdir(parents=True)
    tracking = ("-m", "tests.tracking_server", folder, SERVER)
    with serving(case.cluster, *tracking) as (server, address):
        job = case.job("tracking=mlflow", f"tracking.uri=http://{address}")
        job.wait_for_units(5)
        server.kill()
        ended = case.is_done(job, "the output is published; `weightmill track` sends the numbers later", status=1)
    assert "weightmill track" in ended.said
    with serving(case.cluster, *tracking) as (_, address):
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


@pytest.fixture
def bucket(case: Case) -> Iterator[Cluster]:
    """The cluster, and an empty bucket that its hosts reach."""
    pytest.importorskip("moto", reason="moto[server], which imitates S3, is not installed")
    with serving(case.cluster, "-m", "tests.cluster.buckets", "serve") as (_, said):
        assert said == "ready"
        yield case.cluster


def test_a_bucket_and_a_host_that_is_off(case: Case, bucket: Cluster) -> None:
    """the output is in S3, and a host loses power"""
    here = case.out.parent.parent / "fetched"
    job = case.job(to=f"s3://{buckets.BUCKET}/made/out")
    wait_for(lambda: "%" in job.said or not job.is_running, 60, job.said)
    wait_for(lambda: len({host.name for host, _ in bucket.workers}) > 1 or not job.is_running, 60, job.said)
    time.sleep(1.5)
    bucket.hosts[2].off()
    ended = job.end(200)
    fetch = bucket.network.at_switch(sys.executable, "-m", "tests.cluster.buckets", "fetch", "made", here)
    subprocess.run(fetch, check=True, timeout=60)
    ended = replace(ended, outputs=hashed(here))
    case.row(ended)
    assert ended.status == 0, ended.said
    assert case.bytes_of(ended) == "same"
    assert [path.name for path in here.iterdir()] == ["out"]
    case.is_clean(job, ended)
