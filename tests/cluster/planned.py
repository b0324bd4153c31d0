"""What plan says of three hosts, beside what they take: python -m tests.cluster.planned [layers=120 cpus=0.5 laps=3]

A job of quant=hqq4 on three hosts of so many CPUs each, by a quota; head and driver are on another host, as they are in
what is reckoned. A layer is 19 MB. Plan and job take turns.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cluster import hosts
from tests.cluster.cluster import Cluster, Job

WORKERS = 3
SETTINGS = ("quant=hqq4", "unit_mb=32", "output=hf")


def planned(cluster: Cluster, source: Path, cpus: float, disk_gbps: float) -> dict[str, Any]:
    """Return what plan says in its document, from the page cache."""
    node = f"cluster.node={{cpus: {cpus}, read_gbps: 3, write_gbps: {disk_gbps}}}"
    given = (f"model.path={source}", *SETTINGS, "cluster=ray", f"cluster.nodes={WORKERS}", node, "format=json")
    said = cluster.hosts[0].run(sys.executable, "-m", "jobs.plan", *given)
    found: dict[str, Any] = json.loads(said[said.index("{") :])["cluster"]
    return found


def main(layers: int, cpus: float, laps: int) -> None:
    from tests.cluster.model import write_model

    lacks = hosts.missing() or (None if hosts.can_limit("cpu") else "a CPU quota by a cgroup of version 1")
    if lacks:
        sys.exit(f"several hosts on one machine need {lacks}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_model(folder / "model", layers=layers)
        cluster = Cluster(folder / "hosts", hosts=1 + WORKERS, head_works=False)
        try:
            for lap in range(laps + 1):  # the first compiles kernels, and does not count
                for host in cluster.hosts[1:]:
                    host.limit(cpus if lap else None)
                says = planned(cluster, source, cpus, disk_gbps=0.2)
                ended = Job(cluster, source, folder / "out" / "out", *SETTINGS).end(1200)
                assert ended.status == 0, ended.said
                shutil.rmtree(folder / "out")
                if lap:
                    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in says["seconds_of"].items())
                    ratio = says["seconds"] / ended.seconds
                    print(f"plan {says['seconds']:.1f} s, job {ended.seconds:.1f} s: {ratio:.2f}; by plan: {parts}")
        finally:
            cluster.close()


if __name__ == "__main__":
    given = dict(word.split("=") for word in sys.argv[1:])
    main(int(given.get("layers", 120)), float(given.get("cpus", 0.5)), int(given.get("laps", 3)))
