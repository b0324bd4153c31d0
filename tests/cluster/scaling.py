"""How much faster three hosts are than one, of half a CPU each: python -m tests.cluster.scaling [layers=120]

A job of quant=hqq4, whose head and driver are on another host. Shown are the seconds of the job, and GB/s between the
first and the last finished unit, in which no worker starts. A layer is 19 MB.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.cluster import hosts
from tests.cluster.cluster import Cluster, Job
from tests.cluster.model import write_model

CPUS = 0.5
SETTINGS = ("quant=hqq4", "unit_mb=16", "output=hf")


def measure(folder: Path, source: Path, workers: int) -> tuple[float, float]:
    """Return a job's seconds, and units a second between the first and the last that was finished."""
    cluster = Cluster(folder / f"hosts{workers}", hosts=1 + workers, head_works=False)
    try:
        for warm in (True, False):
            for host in cluster.hosts[1:]:
                host.limit(None if warm else CPUS)
            job = Job(cluster, source, folder / f"out{workers}" / "out", *SETTINGS)
            ended = job.end(1200)
            assert ended.status == 0, ended.said
            assert len(ended.hosts) == workers, ended.hosts
            shutil.rmtree(folder / f"out{workers}")
        times = sorted(when for when, _ in job.units.values())
        return ended.seconds, (len(times) - 1) / (times[-1] - times[0])
    finally:
        cluster.close()


def main(layers: int) -> None:
    lacks = hosts.missing() or (None if hosts.can_limit("cpu") else "a CPU quota by a cgroup of version 1")
    if lacks:
        sys.exit(f"several hosts on one machine need {lacks}")
    with tempfile.TemporaryDirectory() as name:
        source = write_model(Path(name) / "model", layers=layers)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        (one_s, one), (three_s, three) = (measure(Path(name), source, workers) for workers in (1, 3))
    print(f"hqq4 of {size / 1e9:.2f} GB, hosts of {CPUS} CPUs")
    print(f"the whole job     1 host {one_s:6.1f} s   3 hosts {three_s:6.1f} s   {one_s / three_s / 3:.0%} efficiency")
    print(f"units a second    1 host {one:6.2f}     3 hosts {three:6.2f}     {three / one / 3:.0%} efficiency")


if __name__ == "__main__":
    main(int(dict(word.split("=") for word in sys.argv[1:]).get("layers", 120)))
