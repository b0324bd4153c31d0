"""The memory of a job of many units: what it holds of a finished unit does not depend on that unit's tensors."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from jobs.orchestration import source_pass
from jobs.output.report import read_report
from loaders.storage.address import Address
from tests.making import LLAMA, llama_tensors, write_checkpoint

LAYERS = 10
# More than is held of a unit: its file's name, size and hash, and the seconds of its phases. The records of a unit's
# tensors, four or five here with what is stored for each, take more than twice as much.
UNIT_BYTES = 2500


def test_a_job_holds_no_tensors_of_finished_units(
    tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(
        tmp_path / "source", llama_tensors(layers=LAYERS), config={**LLAMA, "num_hidden_layers": LAYERS}
    )
    held: list[int] = []
    take = source_pass._take

    def taken(*arguments: Any) -> int:
        read = take(*arguments)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        return read

    monkeypatch.setattr(source_pass, "_take", taken)
    tracemalloc.start()
    try:
        options = ("unit_mb=0.05", "cluster=local", "cluster.units_at_once=1", "quant=nf4")
        ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", *options)
    finally:
        tracemalloc.stop()
    assert ran.status == 0, ran.err
    assert len(held) > 20
    # The first units also import modules and compile kernels.
    growth = (held[-1] - held[4]) / (len(held) - 5)
    assert growth < UNIT_BYTES, f"{growth:.0f} bytes a unit"
    report = read_report(Address.of(tmp_path / "out"))
    assert len(report.tensors) == len(llama_tensors(layers=LAYERS))
    assert json.loads(report.to_bytes()) == report.to_json()
