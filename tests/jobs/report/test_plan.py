"""jobs.plan's text: short enough for its warnings to be seen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.making import Raw, llama_tensors, write_checkpoint

pytestmark = pytest.mark.quick


def test_of_many_files_a_few_are_listed_and_warnings_come_last(source: Path, weightmill: Any) -> None:
    arguments = ("plan", f"model.path={source}", "quant=nf4", "quant.group_size=128", "unit_mb=0.005")
    few, every = weightmill(*arguments).out, weightmill(*arguments, "tensors=all").out
    count = every.count(".safetensors")
    assert count > 8
    assert few.count(".safetensors") == 4
    assert f"... {count - 4} more (tensors=all lists them)" in few
    for said in (few, every):
        assert said.rindex(".safetensors") < said.index("warning: 12 matrices")


def test_the_disk_is_said_to_need_and_to_have(source: Path, weightmill: Any) -> None:
    said = " ".join(weightmill("plan", f"model.path={source}", "quant=nf4").out.split())
    assert re.search(r"disk: needs [\d.]+ kB, [\d.]+ [GT]B free", said)
    assert "3 files, 21 tensors" in said


def test_a_plan_names_no_dtype_by_the_dozen(tmp_path: Path, weightmill: Any) -> None:
    positions = Raw("I64", np.arange(512, dtype=np.int64))
    root = write_checkpoint(tmp_path / "m", {**llama_tensors(), "model.position_ids": positions})
    said = weightmill("plan", f"model.path={root}", "quant=nf4").out
    assert "dtype not a float" in said
    assert "Q4_0" not in said
