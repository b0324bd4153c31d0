"""Metrics of how much one model's predictions differ from another's over a text: KL divergence, perplexity, agreement.

The KL divergence (Kullback and Leibler, "On information and sufficiency", 1951) is that of the distributions of the
next token. Intervals are percentile bootstraps over windows of text (Efron and Tibshirani, "An introduction to the
bootstrap", chapter 13), because the tokens of one window depend on each other. Of fewer than FEWEST windows there is
no interval: their bootstrap is much too narrow. Shapes: N tokens, W windows, T tokens in each, V words of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

# Bootstrap resamples: the ends of a 95 % interval then vary by less than a hundredth of its width from seed to seed.
RESAMPLES = 10_000
FEWEST = 10  # windows: of skewed means of five, such an interval covers the true one in 81 % of cases, of ten in 88 %
TAIL = 0.025  # the probability on either side of a 95 % interval
BLOCK_NUMBERS = 1 << 22  # logits converted to float64 at once, 32 MiB a copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The loss of quality by quantization, measured over one text.

    kl: the mean KL(original || output) in nats per token, with its 95 % interval kl_low to kl_high, its 99th percentile
    and its maximum over tokens. perplexity_ratio: the output's perplexity over the original's, with its 95 % interval.
    The ends of intervals are None if there are fewer than ten windows.
    top1: the share of tokens, 0 to 1, for which both models find the same next token most likely. tokens: the number of
    predicted tokens, in `windows` windows of `window` tokens. kl_by_window: the windows' means in the text's order, so
    that two outputs can be compared window by window. seconds: the time to evaluate the output; reference_seconds: the
    time to compute the original's logits, 0 if they were cached. engine: the engine that ran the output. text: the
    text's name and digest.
    """

    kl: float
    kl_low: float | None
    kl_high: float | None
    kl_p99: float
    kl_max: float
    perplexity: float
    perplexity_original: float
    perplexity_ratio: float
    perplexity_ratio_low: float | None
    perplexity_ratio_high: float | None
    top1: float
    tokens: int
    windows: int
    window: int
    seconds: float
    reference_seconds: float
    engine: str
    text: str
    kl_by_window: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "kl_by_window": list(self.kl_by_window)}


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores by token, float64, in nats: KL(original || output), and the text's negative log-likelihood under each."""

    kl: np.ndarray
    nll_original: np.ndarray
    nll: np.ndarray
    agrees: np.ndarray  # bool

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.kl).all() and np.isfinite(self.nll).all())


def scores(original_NV: np.ndarray, logits_NV: np.ndarray, targets_N: np.ndarray) -> Scores:
    """Compare two models' logits, float32 (N, V), at the same places of a text whose next tokens are `targets_N`."""
    rows = max(1, BLOCK_NUMBERS // max(1, original_NV.shape[1]))
    parts = [
        _scores(original_NV[at : at + rows], logits_NV[at : at + rows], targets_N[at : at + rows])
        for at in range(0, len(targets_N), rows)
    ]
    return joined(parts)


def _scores(original_NV: np.ndarray, logits_NV: np.ndarray, targets_N: np.ndarray) -> Scores:
    one, other = (torch.from_numpy(np.array(each, np.float32)) for each in (original_NV, logits_NV))
    log_p, log_q = (torch.log_softmax(each.double(), -1) for each in (one, other))
    p = log_p.exp()
    # Where p is 0, the term of the sum is 0 by continuity, while p * log(p) would be NaN.
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    places = torch.from_numpy(targets_N.astype(np.int64))[:, None]
    return Scores(
        terms.sum(-1).clamp_(min=0).numpy(),
        -log_p.gather(-1, places)[:, 0].numpy(),
        -log_q.gather(-1, places)[:, 0].numpy(),
        (one.argmax(-1) == other.argmax(-1)).numpy(),
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """Concatenate the scores of consecutive places."""
    fields = ("kl", "nll_original", "nll", "agrees")
    return Scores(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def interval(means_W: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the mean over equally long windows, from the windows' means.

    It is None for fewer than FEWEST windows.
    """
    if len(means_W) < FEWEST:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(means_W), (RESAMPLES, len(means_W)))
    low, high = np.quantile(means_W[drawn].mean(-1), (TAIL, 1 - TAIL))
    return float(low), float(high)


def summed_up(
    windows: Sequence[Scores], *, window: int, seconds: float, reference_seconds: float, engine: str, text: str
) -> Quality:
    """Aggregate the scores of all windows."""
    every = joined(windows)
    kl_W = np.array([each.kl.mean() for each in windows])
    excess_W = np.array([(each.nll - each.nll_original).mean() for each in windows])
    low, high = interval(kl_W) or (None, None)
    ratio_low, ratio_high = np.exp(interval(excess_W) or (np.nan, np.nan))
    return Quality(
        kl=float(every.kl.mean()),
        kl_low=low,
        kl_high=high,
        kl_p99=float(np.quantile(every.kl, 0.99)),
        kl_max=float(every.kl.max()),
        perplexity=float(np.exp(every.nll.mean())),
        perplexity_original=float(np.exp(every.nll_original.mean())),
        perplexity_ratio=float(np.exp((every.nll - every.nll_original).mean())),
        perplexity_ratio_low=None if low is None else float(ratio_low),
        perplexity_ratio_high=None if low is None else float(ratio_high),
        top1=float(every.agrees.mean()),
        tokens=len(every.kl),
        windows=len(windows),
        window=window,
        seconds=seconds,
        reference_seconds=reference_seconds,
        engine=engine,
        text=text,
        kl_by_window=tuple(float(mean) for mean in kl_W),
    )
