"""The importance of a tensor's errors: the second-order loss that they cause, by the statistics of a calibration.

An error dW of a linear layer y = W x moves the logits. Their Kullback-Leibler divergence from the original's, in nats a
token, is then about 1/2 sum_ij E[g_i^2] E[x_j^2] dW_ij^2, where g is the gradient with respect to y of the
log-likelihood of tokens drawn from the model's own predictions. This is the diagonal of the Fisher information in the
Kronecker-factored form of Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature,
2015, arXiv:1503.05671.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Scheme, Stored, View, Work
from loaders.specs import TensorSpec

INNER = 1 << 18  # weights decoded at once, 1 MiB of float32: they stay in the cache until they are summed


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance of a matrix's weights: rows[i] * columns[j] for weight (i, j), float32 (R,) and (C,)."""

    rows: np.ndarray
    columns: np.ndarray


def weighted_error(
    view: View, scheme: Scheme, spec: TensorSpec, stored: Stored, importances: Sequence[Importance], work: Work
) -> float:
    """Return sum_ij rows[i] columns[j] dW_ij^2, added over all importances: a tied matrix has one for each of its uses.

    `spec` is what the scheme encoded: the view's spec, or that of its cast. Errors that are NaN or infinite count as 0.
    """
    columns, align = spec.shape[-1], scheme.align(spec)
    inner = -(-INNER // align) * align

    def add(start: int, stop: int) -> float:
        total, block = 0.0, view.read(start, stop)
        for at in range(start, stop, inner):
            end = min(at + inner, stop)
            decoded = work.array("decoded", end - at, np.float32)
            scheme.decode(spec, stored, at, end, decoded, work)
            first, last = at // columns, -(-end // columns)
            squares = np.zeros((last - first) * columns, np.float32)
            part = squares[at - first * columns : end - first * columns]
            np.subtract(casts.to_float32(block[at - start : end - start], view.spec.dtype.name), decoded, out=part)
            np.square(part, out=part)
            part[~np.isfinite(part)] = 0
            by_row = squares.reshape(-1, columns)
            total += sum(float(each.rows[first:last] @ (by_row @ each.columns)) for each in importances)
        return total

    return sum(work.sweep(view.spec.num_items, align, add))
