"""A cluster that scales, with Ray's fake provider, whose machines are processes here.

It runs in namespaces of its own: nothing else hears of it, and all of it ends with the command that began it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.places import ROOT
from tests.making import write_checkpoint

SCRIPT = """
ip link set lo up && mount -t tmpfs tmpfs /mnt || exit 77
ray() { "$PYTHON" -m ray.scripts.scripts "$@"; }
ray start --head --node-ip-address=127.0.0.1 --port=6379 --num-cpus=0 --include-dashboard=false \
    --disable-usage-stats --object-store-memory=80000000 --autoscaling-config="$SCALING" > /dev/null 2>&1 || exit 78
"$PYTHON" -m jobs.run "$@" tracking=none unit_mb=0.05 cluster=ray cluster.address=127.0.0.1:6379 cluster.wait_s=30
"""


def scaling(most: int) -> dict[str, object]:
    """The configuration of an autoscaler that may start machines of one CPU; it demands most of these keys."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    # Its machines share one address.
    provider = {
        "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }  # fmt: skip
    worker = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}}
    return {
        "cluster_name": "fake", "max_workers": most, "upscaling_speed": 1.0, "idle_timeout_minutes": 5,
        "provider": provider, "auth": {}, "docker": {}, "file_mounts": {},
        "cluster_synced_files": [], "head_node_type": "head", **{f"{name}_commands": [] for name in commands},
        "available_node_types": {
            "worker": {**worker, "min_workers": 0, "max_workers": most},
            "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
    }  # fmt: skip


@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="namespaces need root")
def test_a_cluster_without_machines_starts_some_for_a_job(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("namespaces need unshare and ip")
    source, out = write_checkpoint(tmp_path / "source", shards=2), tmp_path / "out"
    (tmp_path / "scaling.json").write_text(json.dumps(scaling(most=1)))
    spaces = ("--mount", "--uts", "--ipc", "--pid", "--net", "--fork", "--kill-child", "--mount-proc")
    environment = {
        **os.environ, "RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_TMPDIR": "/mnt", "PYTHON": sys.executable, "SCALING": str(tmp_path / "scaling.json"),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ran = subprocess.run(
        ["unshare", *spaces, "bash", "-c", SCRIPT, "bash", f"model.path={source}", f"output.path={out}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if ran.returncode == 77:
        pytest.skip("this container may not make namespaces")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "waiting up to 30 s for a machine: no machine offers a CPU" in ran.stderr
    assert (out / "weightmill.json").is_file()
