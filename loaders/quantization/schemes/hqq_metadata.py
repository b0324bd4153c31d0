"""Items of metadata beside a weight, as tensors: hqq's encode_safetensor_type (hqq/core/utils.py)."""

from __future__ import annotations

from typing import Any

from loaders.dtypes import DTYPES
from loaders.specs import StoredSpec


def constant(value: Any) -> StoredSpec:
    """Return an item of metadata as the constant tensor that hqq stores."""
    if isinstance(value, bool):
        return StoredSpec(DTYPES["U8"], (), bytes([value]))
    if isinstance(value, int):
        return StoredSpec(DTYPES["I32"], (), value.to_bytes(4, "little"))
    if isinstance(value, str):
        return StoredSpec(DTYPES["U8"], (len(value),), value.encode("ascii"))
    return StoredSpec(DTYPES["I64"], (len(value),), b"".join(n.to_bytes(8, "little") for n in value))
