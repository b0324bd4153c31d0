"""The words for values in a family's table: how an engine changes a tensor's numbers.

What each engine does was read in mlx-lm's models (sanitize) and in llama.cpp's conversion package (modify_tensors).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loaders.architectures.family import text_config
from loaders.architectures.gguf import number
from loaders.dtypes import WEIGHT_DTYPES, DType
from loaders.errors import BadCheckpoint, BadSpec
from loaders.quantization.kernels import casts

Config = Mapping[str, Any]
LARGEST = 1e30  # what any factor is below, so that float32 can hold it


def plus_one(numbers: np.ndarray) -> np.ndarray:
    """Add one: norms that compute with 1 + weight."""
    return numbers + np.float32(1)


def minus_exp(numbers: np.ndarray) -> np.ndarray:
    """Return -exp(x), rounded once: the decay of state spaces, stored as its logarithm.

    torch's exp gives a neighbour of this for one number in a hundred, and which ones depends on the machine: on the
    vector library (MKL's or Sleef's) that it was built with.
    """
    found: np.ndarray = -np.exp(numbers.astype(np.float64)).astype(np.float32)
    return found


def minus_one(numbers: np.ndarray) -> np.ndarray:
    """Take one away: a norm as published again, of which an engine has 1 + weight."""
    return numbers - np.float32(1)


VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    each.__name__: each for each in (plus_one, minus_exp, minus_one)
}


def scaled(config: Config, by: Sequence[str], rows: int, dtype: DType) -> list[tuple[int, float]]:
    """Return the product of settings as the one factor of all rows, rounded to the dtype."""
    return [(rows, _rounded(math.prod(_divisor(config, key) for key in by), dtype))]


def scaled_mamba(config: Config, by: Sequence[str], rows: int, dtype: DType) -> list[tuple[int, float]]:
    """Return the factors of the parts of Mamba's in_proj: one setting for all, and a list of one for each part."""
    inner, groups, state, heads = (
        number(config, f"mamba_{key}") for key in ("d_ssm", "n_groups", "d_state", "n_heads")
    )
    whole, sizes = _rounded(_divisor(config, by[0]), dtype), (inner, inner, groups * state, groups * state, heads)
    if sum(sizes) != rows:
        raise BadCheckpoint(f"expected {sum(sizes)} rows, found {rows}")
    parts = [_rounded(_divisor(config, f"{by[1]}.{index}"), dtype) for index in range(len(sizes))]
    return [(size, _rounded(whole * part, dtype)) for size, part in zip(sizes, parts, strict=True)]


def number_at(config: Config, path: str, default: float | None = None) -> float:
    """Return a number of config.json; KEY.2 is the third of a list.

    Raises:
        BadSpec: it is no finite number that float32 can hold, or missing without a default.
    """
    key, _, index = path.partition(".")
    found = text_config(config, key)
    if index and isinstance(found, list) and int(index) < len(found):
        found = found[int(index)]
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < LARGEST:
        raise BadSpec(f"config.json: expected a number as {path}, found {str(found)[:80]}")
    return float(found)


def _divisor(config: Config, path: str) -> float:
    """Return a number by which rows are multiplied, and divided again on the way back.

    Raises:
        BadSpec: it is no such number.
    """
    found = number_at(config, path)
    if not found:
        raise BadSpec(f"config.json: expected a number other than 0 as {path}")
    return found


def _rounded(value: float, dtype: DType) -> float:
    name = dtype.name if dtype.name in WEIGHT_DTYPES else "F32"
    return float(casts.to_float32(casts.cast(np.array([value], np.float32), "F32", name), name)[0])


# The words that multiply rows, and by what. With "un" before it, a word divides.
FACTORS: dict[str, Callable[[Config, Sequence[str], int, DType], list[tuple[int, float]]]] = {
    each.__name__: each for each in (scaled, scaled_mamba)
}
UNDONE_BY = {"plus_one": "minus_one", "minus_one": "plus_one"}
UNDONE_BY |= {f"un{word}": word for word in FACTORS} | {word: f"un{word}" for word in FACTORS}
