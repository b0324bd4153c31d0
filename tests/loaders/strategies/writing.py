"""A small checkpoint to read, from the page cache or from the disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from loaders.storage import local
from tests.making import LLAMA, Raw, write_checkpoint

MB = 1_000_000


def write(folder: Path, count: int = 6, items: int = 1000, shards: int = 2) -> dict[str, bytes]:
    rng = np.random.default_rng(2)
    made = {f"layers.{i}.up.weight": Raw("BF16", rng.integers(0, 1 << 16, items, np.uint16)) for i in range(count)}
    write_checkpoint(folder, made, config=LLAMA, shards=shards)
    return {name: raw.data.tobytes() for name, raw in made.items()}


def drop(folder: Path) -> None:
    """Drop the weight files from the page cache; skip the test where that is not possible."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb+") as opened:
            os.fsync(opened.fileno())  # pages that were not written stay
        if local.drop_cached(path) != 0:
            pytest.skip("this filesystem keeps its files in memory")
