"""Rotary position embeddings: what config.json says of them, and scalings as factors of the frequencies, and back.

The arithmetic of each scaling is that of transformers 5 (modeling_rope_utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np

from loaders.architectures.family import text_config
from loaders.errors import BadSpec

HAS_ORIGINAL = ("llama3", "yarn", "longrope")  # scalings that need the length of the texts before the scaling
LARGEST = 1e30  # what any setting is below, so that float32 can hold it
BETA_FAST, BETA_SLOW = 32.0, 1.0  # yarn's defaults
# Factors of Llama 3.1's scaling that are tried where a GGUF does not show them: those that models were published with,
# and powers of two for the rest. The low one is always 1: scaling it and the other two changes nothing.
FACTORS = (8.0, 32.0, 2.0, 4.0, 16.0, 64.0)
HIGH_FACTORS: tuple[float, ...] = (4.0, 2.0, 8.0, 16.0, 32.0, 1.5, 3.0)
LENGTHS = tuple(2**power for power in (13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 14, 15, 16, 17, 18, 19, 20))


def rope_of(config: Mapping[str, Any], layers: str | None = None) -> dict[str, Any]:
    """Return rope_theta, rope_type and the scaling's settings from either style of config.json.

    `layers` is the kind of layers whose settings are returned; without it, all must have the same.

    Raises:
        BadSpec: kinds of layers differ in them.
    """
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        block = text_config(config, key)
        if isinstance(block, Mapping):
            own = block.get(layers) if layers else None
            found |= own if isinstance(own, Mapping) else _of_all_layers(block)
    if "type" in found:
        found.setdefault("rope_type", found["type"])
    if found.get("rope_type") == "su":  # what the first models with longrope call it
        found["rope_type"] = "longrope"
    theta = text_config(config, "rope_theta")
    if theta is not None:
        found.setdefault("rope_theta", theta)
    if found.get("rope_type") in HAS_ORIGINAL:
        original = text_config(config, "original_max_position_embeddings")
        if original is not None:
            found["original_max_position_embeddings"] = original
        elif found.get("original_max_position_embeddings") is None:
            found["original_max_position_embeddings"] = text_config(config, "max_position_embeddings")
    return found


def _of_all_layers(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a block gives for all layers, which may be under each kind of layers."""
    kinds = {key: value for key, value in block.items() if key.endswith("_attention") and isinstance(value, Mapping)}
    if not kinds:
        return dict(block)
    first, *others = kinds.values()
    if any(other != first for other in others):
        raise BadSpec(f"config.json: {', '.join(kinds)} have different rotary embeddings, and one is expected for all")
    return dict(first)


def rope_number(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a setting of rotary embeddings, which must be a finite number above zero.

    Raises:
        BadSpec: it is missing, or something else.
    """
    found = rope.get(key)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < LARGEST:
        kind = rope.get("rope_type", "default")
        raise BadSpec(f"config.json: the rotary embeddings ({kind}) need a number above 0 as {key}, found {found!r}")
    return float(found)


def usual_attention_factor(factor: float) -> float:
    """Return the factor by which yarn scales the embeddings if nothing else is said."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def attention_factor(rope: Mapping[str, Any]) -> float | None:
    """Return the factor by which yarn scales the embeddings, if it is said; None for the usual one."""
    if rope.get("attention_factor") is not None:
        return rope_number(rope, "attention_factor")
    if not rope.get("mscale") or not rope.get("mscale_all_dim"):
        return None
    factor = rope_number(rope, "factor")
    one, other = (rope_number(rope, key) for key in ("mscale", "mscale_all_dim"))
    if factor <= 1 or one == other:
        return 1.0
    return (0.1 * one * math.log(factor) + 1.0) / (0.1 * other * math.log(factor) + 1.0)


def frequency_factors(rope: Mapping[str, Any], length: int) -> np.ndarray | None:
    """Return the divisors of the frequencies of heads of `length`: float32 (length/2,), or None.

    They exist for Llama 3.1's scaling, and for a longrope that is the same for short and for long texts. The arithmetic
    is float32, as in llama.cpp's converter (conversion/llama.py, generate_extra_tensors), and gives the same but for
    the last bit of a power.

    Raises:
        BadSpec: the scaling lacks a setting.
    """
    if rope.get("rope_type") == "longrope":
        return _constant_longrope(rope, length)
    if rope.get("rope_type") != "llama3":
        return None
    factor, low, high = (rope_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original, base = rope_number(rope, "original_max_position_embeddings"), rope_number(rope, "rope_theta", 10000.0)
    return _llama3(factor, low, high, original, _wavelengths(base, length))


def _wavelengths(base: float, length: int) -> np.ndarray:
    frequencies = 1.0 / base ** (np.arange(0, length, 2, dtype=np.float32) / np.float32(length))
    return np.asarray(np.float32(2 * math.pi) / frequencies)


def _llama3(factor: float, low: float, high: float, original: float, wavelengths: np.ndarray) -> np.ndarray:
    # Between the two lengths this is a mean; outside, where it may divide by zero, it is not taken. Where they are one,
    # nothing is between.
    with np.errstate(divide="ignore", invalid="ignore"):
        smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
        between = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    long = np.where((wavelengths > original / low) | (low == high), np.float32(factor), between)
    return np.where(wavelengths < original / high, np.float32(1), long).astype(np.float32)


def _constant_longrope(rope: Mapping[str, Any], length: int) -> np.ndarray | None:
    short, long = rope.get("short_factor"), rope.get("long_factor")
    is_same = isinstance(short, list) and short == long and len(short) == length // 2
    if not is_same or rope.get("attention_factor") != 1 or not all(isinstance(n, float) and n > 0 for n in short or ()):
        return None
    return np.array(short, np.float32)


def scaling_of(factors: np.ndarray, base: float, context: int) -> dict[str, Any]:
    """Return the scaling that divides the frequencies by `factors`, float32 (length/2,): the way back.

    It is one of Llama 3.1's kind that gives these factors to within rounding, if one does. More than one may, where few
    frequencies are between the scaled and the others. Factors of another kind are those of a longrope for texts of any
    length, of which `context` is the longest.
    """
    if np.all(factors == 1):
        return {}
    wavelengths, close = _wavelengths(base, 2 * factors.size), None
    for factor, high, original in _candidates(factors, wavelengths):
        made = _llama3(factor, 1.0, high, original, wavelengths)
        found = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
        found["original_max_position_embeddings"] = original
        if np.array_equal(made, factors):
            return found
        if close is None and np.allclose(made, factors, rtol=2e-6, atol=0):
            close = found
    if close is not None:
        return close
    own = [float(factor) for factor in factors]
    return {
        "rope_type": "longrope", "short_factor": own, "long_factor": own, "factor": 1.0, "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }  # fmt: skip


def _candidates(factors: np.ndarray, wavelengths: np.ndarray) -> list[tuple[float, float, int]]:
    """Return settings of Llama 3.1's scaling to try: its factor, the factor of high frequencies, and the length."""
    largest = float(factors.max())
    every = dict.fromkeys((largest, *FACTORS))
    found = [(8.0, 4.0, 8192), (32.0, 4.0, 8192), *((largest, h, n) for h, n in _solved(factors, wavelengths))]
    return [*found, *product(every, HIGH_FACTORS, LENGTHS)]


def _solved(factors: np.ndarray, wavelengths: np.ndarray) -> Iterator[tuple[float, int]]:
    """Work settings out from frequencies between the scaled and the others, whose height over 1/wavelength is a line.

    Two of them give both settings; of one, those that go with the usual factors of high frequencies.
    """
    largest = float(factors.max())
    between = np.flatnonzero((factors > 1) & (factors < largest))
    if between.size == 0:
        return
    first, last = between[0], between[-1]
    (x0, y0), (x1, y1) = (
        (1 / float(wavelengths[n]), (1 / float(factors[n]) - 1 / largest) / (1 - 1 / largest)) for n in (first, last)
    )
    highs = HIGH_FACTORS
    if x0 != x1 and y0 != y1:
        start = y0 - (y0 - y1) / (x0 - x1) * x0  # -1 / (high - 1), where the low factor is 1
        exact = 1 - 1 / start if start < 0 else 1.0
        highs = tuple(dict.fromkeys(round(exact, digits) for digits in range(4)))
    for high in highs:
        original = (1 + y0 * (high - 1)) / x0
        if high > 1 and original < 1 << 30:
            yield high, round(original)
