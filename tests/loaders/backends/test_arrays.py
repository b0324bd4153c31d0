"""Stored bytes as arrays of numpy, torch and MLX: dtypes that a device cannot hold, crooked memory."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from loaders.backends import arrays
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec
from loaders.specs import WeightSpec

# --- dtypes


def test_mps_gets_float16_for_bfloat16_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    told = arrays.Told("mps")
    with caplog.at_level(logging.WARNING, "weightmill"):
        for _ in range(3):
            assert told.dtype(DTYPES["BF16"]).name == "F16"
    assert [r.message for r in caplog.records] == ["device=mps: it has no bfloat16; weights become float16"]
    assert told.dtype(DTYPES["F64"]).name == "F32"
    assert told.dtype(DTYPES["F16"]).name == "F16"
    with pytest.raises(BadSpec, match="device=mps: it has no float8_e4m3fn; load to device=cpu"):
        told.dtype(DTYPES["F8_E4M3"])
    assert arrays.allowed_dtype("cuda", DTYPES["BF16"]).name == "BF16"


@pytest.mark.parametrize(
    ("dtype", "shape", "wanted"),
    [
        ("BF16", (3, 4), (3, 4)),
        ("Q4_K", (2, 512), (2, 288)),
        ("F4", (2, 6), (2, 3)),
        ("F4", (2, 3), (3,)),
        ("F6_E2M3", (2, 8), (2, 6)),
    ],
)
def test_numbers_of_less_than_a_byte_are_rows_of_bytes(dtype: str, shape: Any, wanted: Any) -> None:
    assert arrays.storage_shape(DTYPES[dtype], shape) == wanted
    spec = WeightSpec(name="w", dtype=DTYPES[dtype], shape=shape, file="f", offset=0, size=DTYPES[dtype].size(shape))
    assert arrays.as_numpy(np.zeros(spec.size, np.uint8), spec).shape == wanted


@pytest.mark.engine
def test_crooked_and_read_only_memory_is_copied_for_torch() -> None:
    torch = pytest.importorskip("torch")
    memory = np.arange(17, dtype=np.uint8)
    spec = WeightSpec(name="w", dtype=DTYPES["F32"], shape=(4,), file="f", offset=0, size=16)
    wanted = memory[1:].copy().view(np.float32)
    assert torch.equal(arrays.as_torch(memory[1:], spec), torch.from_numpy(wanted))
    memory.flags.writeable = False
    made = arrays.as_torch(memory[:16], spec)
    made.zero_()
    assert memory[1] == 1
