"""Two hosts, in the default run: both work, one that loses its power costs nothing but time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Job, hashed
from tests.making import make_source


@pytest.mark.slow
def test_two_hosts_share_a_job_and_write_what_one_process_writes(folder: Path, weightmill: object) -> None:
    source, given = make_source(folder / "small"), ("unit_mb=0.02",)
    assert callable(weightmill)
    ran = weightmill("run", f"model.path={source}", f"output.path={folder / 'here' / 'out'}", "cluster=local", *given)
    assert ran.status == 0, ran.err
    cluster = Cluster(folder / "two", hosts=2)
    try:
        job = Job(cluster, source, folder / "there" / "out", *given)
        ended = job.end(120)
        assert ended.status == 0, ended.said
        assert ended.outputs == hashed(folder / "here")
        assert ended.left == ()
        assert ended.foreign == []
        assert sorted(ended.hosts) == ["host1", "host2"]
    finally:
        cluster.close()
        for name in ("small", "here", "there"):
            shutil.rmtree(folder / name, ignore_errors=True)
