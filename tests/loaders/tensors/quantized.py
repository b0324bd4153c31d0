"""Checkpoints that come quantized, and what float8 means, written out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.making import LLAMA, TORCH_NAMES, Raw, values_of, weights, write_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def write(root: Path, tensors: Mapping[str, Raw], block: Mapping[str, Any], shards: int = 1, **config: Any) -> Path:
    dtype = config.pop("dtype", "F32")
    whole = {**LLAMA, "dtype": TORCH_NAMES[dtype], "quantization_config": dict(block), **config}
    return write_checkpoint(root, dict(tensors), config=whole, shards=shards)


def bf16(array: np.ndarray) -> np.ndarray:
    return values_of(weights(array, "BF16"))


# --- fp8 by blocks


def e4m3_values() -> np.ndarray:
    """What each of the 256 codes means."""
    table = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        table.append(sign * (np.nan if code & 127 == 127 else value))
    return np.array(table, np.float32)


e4m3_values_once = e4m3_values()


def fp8_tensors(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 127) == 127] = 0
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return codes, rng.standard_normal(grid).astype(np.float32) * 1e-3
