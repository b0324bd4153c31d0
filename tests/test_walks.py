"""The walks of a tensor's bytes, of a setting and of the errors stay as short as they are: see tests/walks.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.walks import LIMITS, WALKS, lines

SURELY = {  # files without which the walk was not seen
    "bytes": ["loaders/strategies/lazy.py", "loaders/containers/writer.py", "loaders/containers/read_back.py"],
    "group_size": ["jobs/cli/main.py", "loaders/presets/settings.py", "loaders/quantization/kernels/cpu.py"],
    "errors": ["jobs/execution/unit.py", "jobs/report/metrics.py", "jobs/tracking/mlflow_run.py"],
}
BESIDE = {"bytes": 2, "group_size": 0, "errors": 3}  # compiled kernels, and what lies before the walk


@pytest.mark.quick
@pytest.mark.parametrize("name", WALKS)
def test_a_walk_is_short(name: str, tmp_path: Path) -> None:
    walk = WALKS[name](tmp_path)
    said = "\n".join(lines(name, walk))
    assert set(SURELY[name]) <= set(walk.counted), said
    assert len(walk.counted) <= LIMITS[name], said
    assert len(walk.compiled) + len(walk.before) <= BESIDE[name], said
