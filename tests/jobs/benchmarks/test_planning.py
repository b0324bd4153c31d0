"""`bench plan`: headers without weights are planned, and every phase is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks.plan_phases import PHASES, SAY, START
from jobs.benchmarks.planning import make_headers
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.tensors.sources import tensors_of


@pytest.mark.parametrize("count", [40, 41])
def test_made_headers_are_a_whole_checkpoint(tmp_path: Path, count: int) -> None:
    make_headers(tmp_path / "m", count, is_fp8=True)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert count - 1 <= len(checkpoint.weights) <= count
    assert len(tensors_of(checkpoint, decode=True).tensors) < len(checkpoint.weights)
    assert checkpoint.family.name == "deepseek"


def test_a_plan_is_timed_by_phases(weightmill: Any) -> None:
    ran = weightmill("bench", "plan", "tensors=1000", "quants=[none]", "stored=bf16", "format=json")
    assert ran.status == 0, ran.err
    [row] = ran.document["rows"]
    assert set(row["phases"]) == {START, SAY, *(phase for phase, _, _ in PHASES)}
    assert row["cpu_s"] == pytest.approx(sum(row["phases"].values()))
    assert row["peak_bytes"] > 0
