"""LLM.int8 as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.errors import BadCheckpoint
from tests.loaders.tensors.quantized import Q_PROJ, bf16, write
from tests.making import Raw, llama_tensors, read_safetensors, values_of, weights, write_checkpoint
from tests.reading import tensors_in
from tests.reference import decode_int8

# --- LLM.int8


def test_int8_comes_back_plain(tmp_path: Path, weightmill: Any) -> None:
    root = write_checkpoint(tmp_path / "source")
    assert weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'int8'}", "quant=int8").status == 0
    stored = read_safetensors(tmp_path / "int8")
    wanted = decode_int8(stored, Q_PROJ.removesuffix(".weight"))
    assert weightmill("verify", f"output.path={tmp_path / 'int8'}").status == 0
    plain = weightmill(
        "run",
        f"model.path={tmp_path / 'int8'}",
        f"output.path={tmp_path / 'plain'}",
        "quant=none",
        "quant.dtype=float16",
    )
    assert plain.status == 0, plain.err
    found = read_safetensors(tmp_path / "plain")
    assert set(found) == set(read_safetensors(root))
    assert np.array_equal(values_of(found[Q_PROJ]), values_of(weights(bf16(wanted), "F16")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SCB": None}, r"q_proj.weight: it is quantized, but .*q_proj.SCB is missing"),
        ({"weight": None}, r"it is quantized, but .*q_proj.weight is missing"),
        ({"SCB": Raw("F16", np.ones(64, np.float16))}, r"q_proj.SCB: expected F32 \[64\] .*found F16 \[64\]"),
        ({"SCB": Raw("F32", np.ones(32, np.float32))}, r"q_proj.SCB: expected F32 \[64\] .*found F32 \[32\]"),
        ({"weight_format": Raw("U8", np.array(2, np.uint8))}, r"weight_format: only 0, rows as they are, is read"),
    ],
)
def test_int8_that_is_not_whole_is_refused(change: dict[str, Raw | None], message: str, tmp_path: Path) -> None:
    module = Q_PROJ.removesuffix("weight")
    tensors = {
        **llama_tensors("F32"),
        Q_PROJ: Raw("I8", np.ones((64, 64), np.int8)),
        module + "SCB": Raw("F32", np.ones(64, np.float32)),
        **{module + name: raw for name, raw in change.items()},
    }
    root = write(tmp_path, {n: raw for n, raw in tensors.items() if raw is not None}, {
        "quant_method": "bitsandbytes", "load_in_8bit": True})  # fmt: skip
    with pytest.raises(BadCheckpoint, match=message):
        tensors_in(root)
