"""How far a model's predictions lie from another's over a text: KL divergence, perplexity, agreement.

Kullback and Leibler, "On information and sufficiency" (1951), of the distributions of the next token; intervals are
percentile bootstraps over windows of text (Efron and Tibshirani, "An introduction to the bootstrap", chapter 13), as
tokens of one window depend on one another. Shapes: N tokens, W windows, T tokens of each, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

RESAMPLES = 10_000
TAIL = 0.025  # on either side of a 95 % interval
BLOCK_NUMBERS = 1 << 22  # logits taken to float64 at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What quantization cost a model, over one text.

    kl: mean KL(original || output) in nats a token, with its 95 % interval kl_low to kl_high, its 99th percentile and
    its maximum over tokens. perplexity_ratio: the output's perplexity over the original's, with its 95 % interval.
    top1: the share of tokens, 0 to 1, for which both find the same next token most likely. tokens: how many were
    predicted, in `windows` windows of `window` tokens. kl_by_window: means of the windows in the text's order, so that
    two outputs can be compared pair by pair. seconds: what evaluating the output took; reference_seconds: what the
    original's logits took, 0 where they were there already. engine: what ran the output. text: its name and digest.
    """

    kl: float
    kl_low: float
    kl_high: float
    kl_p99: float
    kl_max: float
    perplexity: float
    perplexity_original: float
    perplexity_ratio: float
    perplexity_ratio_low: float
    perplexity_ratio_high: float
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
    """By token, float64: KL(original || output), and the negative log-likelihood of the text under each; nats."""

    kl: np.ndarray
    nll_original: np.ndarray
    nll: np.ndarray
    agrees: np.ndarray  # bool

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.kl).all() and np.isfinite(self.nll).all())


def scores(original_NV: np.ndarray, logits_NV: np.ndarray, targets_N: np.ndarray) -> Scores:
    """Compare two models' logits, float32, at the same places of a text whose next tokens are `targets_N`."""
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
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # what the original holds impossible costs nothing
    places = torch.from_numpy(targets_N.astype(np.int64))[:, None]
    return Scores(
        terms.sum(-1).clamp_(min=0).numpy(),
        -log_p.gather(-1, places)[:, 0].numpy(),
        -log_q.gather(-1, places)[:, 0].numpy(),
        (one.argmax(-1) == other.argmax(-1)).numpy(),
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of consecutive places as one."""
    fields = ("kl", "nll_original", "nll", "agrees")
    return Scores(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def interval(means_W: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of equally long windows, by their means."""
    drawn = np.random.default_rng(seed).integers(0, len(means_W), (RESAMPLES, len(means_W)))
    low, high = np.quantile(means_W[drawn].mean(-1), (TAIL, 1 - TAIL))
    return float(low), float(high)


def summed_up(
    windows: Sequence[Scores], *, window: int, seconds: float, reference_seconds: float, engine: str, text: str
) -> Quality:
    """What the scores of each window come to."""
    every = joined(windows)
    kl_W = np.array([each.kl.mean() for each in windows])
    excess_W = np.array([(each.nll - each.nll_original).mean() for each in windows])
    low, high = interval(kl_W)
    ratio_low, ratio_high = interval(excess_W)
    return Quality(
        kl=float(every.kl.mean()),
        kl_low=low,
        kl_high=high,
        kl_p99=float(np.quantile(every.kl, 0.99)),
        kl_max=float(every.kl.max()),
        perplexity=float(np.exp(every.nll.mean())),
        perplexity_original=float(np.exp(every.nll_original.mean())),
        perplexity_ratio=float(np.exp((every.nll - every.nll_original).mean())),
        perplexity_ratio_low=float(np.exp(ratio_low)),
        perplexity_ratio_high=float(np.exp(ratio_high)),
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
