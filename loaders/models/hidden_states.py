"""Metrics of how much one model's last hidden states differ from another's over a text: cosine and relative error.

This is how encoders and other models without logits of the next token are judged: their hidden states, or means of
them, are what they are used for. Cosines are of one token's two vectors; the relative error is that of all numbers
together, as it is of weights. Shapes: W windows, T tokens in each, H numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loaders.models.quality import interval

WORST = 0.01  # the share of tokens whose cosine is at most `cosine_p1`


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """How close an output's last hidden states are to its original's, measured over one text.

    cosine: the mean over tokens, with its 95 % interval cosine_low to cosine_high (None for fewer than ten windows),
    its 1st percentile and its minimum. pooled_cosine: the mean over windows of the cosine of their mean hidden states,
    which many use as the embedding of a text. hidden_error: sqrt(sum (x - y)^2 / sum x^2) over all numbers. tokens: the
    number of compared tokens, in `windows` windows of `window` tokens. cosine_by_window, seconds, reference_seconds,
    engine and text are as in `loaders.models.quality.Quality`.
    """

    cosine: float
    cosine_low: float | None
    cosine_high: float | None
    cosine_p1: float
    cosine_min: float
    pooled_cosine: float
    hidden_error: float
    tokens: int
    windows: int
    window: int
    seconds: float
    reference_seconds: float
    engine: str
    text: str
    cosine_by_window: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cosine_by_window": list(self.cosine_by_window)}


@dataclass(frozen=True, slots=True)
class Compared:
    """A window's cosines by token, float64 (T,); that of its means; and the sums of squares of error and original."""

    cosine: np.ndarray
    pooled: float
    error: float
    signal: float

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.cosine).all() and np.isfinite(self.error))


def compared(original_TH: np.ndarray, output_TH: np.ndarray) -> Compared:
    """Compare two models' hidden states of one window, float32 (T, H)."""
    one, other = original_TH.astype(np.float64), output_TH.astype(np.float64)
    return Compared(
        _cosine(one, other),
        float(_cosine(one.mean(0), other.mean(0))),
        float(np.square(one - other).sum()),
        float(np.square(one).sum()),
    )


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine along the last axis; 1 of two zeros, 0 of a zero and something else."""
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    is_same = (one == other).all(-1)
    found = (one * other).sum(-1) / np.where(lengths > 0, lengths, 1)
    return np.asarray(np.where(is_same, 1.0, found.clip(-1, 1)))


def summed_up(
    windows: Sequence[Compared], *, window: int, seconds: float, reference_seconds: float, engine: str, text: str
) -> Closeness:
    """Aggregate what was compared of all windows."""
    every = np.concatenate([each.cosine for each in windows])
    means_W = np.array([each.cosine.mean() for each in windows])
    low, high = interval(means_W) or (None, None)
    error, signal = sum(each.error for each in windows), sum(each.signal for each in windows)
    return Closeness(
        cosine=float(every.mean()),
        cosine_low=low,
        cosine_high=high,
        cosine_p1=float(np.quantile(every, WORST)),
        cosine_min=float(every.min()),
        pooled_cosine=float(np.mean([each.pooled for each in windows])),
        hidden_error=float(np.sqrt(error / signal)) if signal else float(error > 0),
        tokens=len(every),
        windows=len(windows),
        window=window,
        seconds=seconds,
        reference_seconds=reference_seconds,
        engine=engine,
        text=text,
        cosine_by_window=tuple(float(mean) for mean in means_W),
    )
