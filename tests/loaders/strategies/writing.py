"""A small checkpoint to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.making import LLAMA, Raw, write_checkpoint

MB = 1_000_000


def write(folder: Path, count: int = 6, items: int = 1000, shards: int = 2) -> dict[str, bytes]:
    rng = np.random.default_rng(2)
    made = {f"layers.{i}.up.weight": Raw("BF16", rng.integers(0, 1 << 16, items, np.uint16)) for i in range(count)}
    write_checkpoint(folder, made, config=LLAMA, shards=shards)
    return {name: raw.data.tobytes() for name, raw in made.items()}
