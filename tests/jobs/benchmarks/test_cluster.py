"""bench cluster: what Ray costs beside this process. Here, another cluster stands for Ray's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks import cluster
from jobs.benchmarks.commands import Ran
from jobs.execution.cluster import LocalCluster
from tests.making import write_checkpoint

pytestmark = pytest.mark.quick


def test_the_start_is_told_apart_from_the_job(weightmill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def command(words: Sequence[str], environment: Any) -> Ran:
        [how] = [word for word in words if word.startswith("cluster=")]
        kind = "job" if f"model.path={tmp_path / 'model'}" in words else "start"
        ran.append((kind, how))
        seconds = {"start": 1.0, "job": 10.0}[kind] + (6.5 if how == "cluster=ray" else 0.0)
        return Ran(
            seconds=seconds, user_s=0, system_s=0, minor_faults=0, waits=0, preemptions=0, fetched_bytes=0,
            peak_bytes=0, said=json.dumps({"status": "done"}),
        )  # fmt: skip

    monkeypatch.setattr(cluster, "run_command", command)
    monkeypatch.setattr(cluster, "choose", lambda spec: (LocalCluster(spec), ""))
    write_checkpoint(tmp_path / "model")
    given = ("bench", "cluster", f"model.path={tmp_path / 'model'}", "units=50", "repeats=2")
    found = weightmill(*given, "format=json").document
    # Once to compile, then in turn.
    turn = [("start", "cluster=local"), ("start", "cluster=ray"), ("job", "cluster=local"), ("job", "cluster=ray")]
    assert ran == [*turn[:2], *turn, *turn]
    assert found["start_s"] == pytest.approx(6.5)
    assert found["times_local"] == pytest.approx(1)
    assert len(found["driver_memory_bytes"]) == cluster.LOOKS
    assert 0 < found["driver_cpu_ms"] < 1000
    said = " ".join(weightmill(*given).out.split())
    assert "the start of Ray: 6.5 s; the job beside that: 1.00 times as long as in this process" in said
    assert "the driver, over 50 empty units:" in said
