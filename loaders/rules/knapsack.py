"""The solver for the best mix within a budget: one option for each item, so that sizes fit and errors sum to the least.

This is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). Its
linear relaxation is solved by taking the steps of every item's convex hull in the order of error saved per byte. The
first step that no longer fits gives the price of a byte, and a bound that no mix can be below. Options whose reduced
cost exceeds the gap cannot be in a better mix and are left out. The rest is solved by dynamic programming over the
undominated (size, error) pairs, pruned by the same bound. That is exact unless more than MOST_STATES pairs would have
to be held: then the least promising ones are dropped, and the gap to the bound says how much could be lost at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# (size, error) pairs held after an item. More pairs make fewer problems inexact; time and memory grow with pairs times
# options, and memory with pairs times items, since each pair remembers its parent.
MOST_STATES = 50_000
ROUNDING = 1e-12  # a share of the bound by which sums may differ when they are added in another order


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store an item. `error` is finite and not negative; `size` is in bytes."""

    label: str
    size: int
    error: float


@dataclass(frozen=True, slots=True)
class Item:
    """An item to store, such as a tensor, for which one of the options is chosen."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A solution: an option for each item, in their order. No mix within the budget has less error than `bound`."""

    options: tuple[Option, ...]
    bound: float
    is_optimal: bool

    @property
    def size(self) -> int:
        return sum(option.size for option in self.options)

    @property
    def error(self) -> float:
        return sum(option.error for option in self.options)

    @property
    def gap(self) -> float:
        """The share of the error that a better mix could save at most; 0.0 where the error is known to be the least."""
        return 0.0 if self.is_optimal or not self.error else max(0.0, 1 - self.bound / self.error)


def least_size(items: Sequence[Item]) -> int:
    """Return the least size of any mix, in bytes: no smaller budget can be met."""
    return sum(min(option.size for option in item.options) for item in items)


def choose(items: Sequence[Item], budget: int) -> Choice:
    """Return the mix of least error whose sizes sum to at most `budget` bytes; of equal ones, a smaller.

    Raises:
        ValueError: no mix fits.
    """
    if least_size(items) > budget:
        raise ValueError(f"a budget of {budget} bytes cannot be met: the least possible is {least_size(items)}")
    fronts = [_undominated(item.options) for item in items]
    greedy, price, bound = _relaxed(fronts, budget)
    error = sum(front[at].error for front, at in zip(fronts, greedy, strict=True))
    if not price:
        return Choice(tuple(f[at] for f, at in zip(fronts, greedy, strict=True)), bound, is_optimal=True)
    better, is_optimal = _search(fronts, budget, price, error)
    chosen = greedy if better is None else better
    return Choice(tuple(f[at] for f, at in zip(fronts, chosen, strict=True)), bound, is_optimal)


def _undominated(options: Sequence[Option]) -> list[Option]:
    """Return the options that are worth their size, sorted by size: each has less error than all before it."""
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (o.size, o.error, o.label)):
        if not front or option.error < front[-1].error:
            front.append(option)
    return front


def _hull(front: Sequence[Option]) -> list[int]:
    """Return the indices of the options on the lower convex hull of (size, error)."""
    hull: list[int] = []
    for at, option in enumerate(front):
        while len(hull) > 1 and _rate(front[hull[-2]], front[hull[-1]]) <= _rate(front[hull[-1]], option):
            hull.pop()
        hull.append(at)
    return hull


def _rate(low: Option, high: Option) -> float:
    """Return the error saved per byte."""
    return (low.error - high.error) / (high.size - low.size)


def _relaxed(fronts: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], float, float]:
    """Solve the linear relaxation: return a mix that fits, the price of a byte, and the bound.

    The price is 0 where everything fits. After the first step that does not fit, smaller ones are still taken, which
    makes the mix better and leaves the bound as it is.
    """
    steps = []
    for item, front in enumerate(fronts):
        hull = _hull(front)
        steps += [(-_rate(front[low], front[high]), item, low, high) for low, high in pairwise(hull)]
    chosen = [0] * len(fronts)
    left = budget - sum(front[0].size for front in fronts)
    price, bound = 0.0, None
    error = sum(front[0].error for front in fronts)
    for rate, item, low, high in sorted(steps):
        front = fronts[item]
        size = front[high].size - front[low].size
        if bound is None and size > left:
            price, bound = -rate, error + rate * left
        if chosen[item] == low and size <= left:
            chosen[item], left = high, left - size
            error += front[high].error - front[low].error
    return chosen, price, error if bound is None else bound


def _search(
    fronts: Sequence[Sequence[Option]], budget: int, price: float, known: float
) -> tuple[list[int] | None, bool]:
    """Search for a mix with no more error than `known`; return it, if there is one, and whether the search was exact.

    Items go in the order of the spread of their reduced costs, so that pairs which cannot win exceed the gap early.
    """
    reduced = [np.array([o.error + price * o.size for o in front]) for front in fronts]
    bound = sum(float(costs.min()) for costs in reduced) - price * budget
    slack = known - bound + ROUNDING * (abs(known) + price * budget)
    order = sorted(range(len(fronts)), key=lambda item: -float(np.ptp(reduced[item])))
    sizes, errors = np.zeros(1, np.int64), np.zeros(1)
    excess = np.zeros(1)  # reduced cost above the least possible so far
    rest = sum(front[0].size for front in fronts)
    back: list[tuple[np.ndarray, np.ndarray]] = []
    is_exact = True
    for item in order:
        costs = reduced[item] - reduced[item].min()
        kept = np.flatnonzero(costs <= slack)
        rest -= fronts[item][0].size
        parents = np.repeat(np.arange(len(sizes)), len(kept))
        picks = np.tile(kept, len(sizes))
        sizes = sizes[parents] + np.array([o.size for o in fronts[item]], np.int64)[picks]
        errors = errors[parents] + np.array([o.error for o in fronts[item]])[picks]
        excess = excess[parents] + costs[picks]
        fits = np.flatnonzero((sizes + rest <= budget) & (excess <= slack))
        ordered = fits[np.lexsort((errors[fits], sizes[fits]))]
        least = np.minimum.accumulate(errors[ordered])
        ordered = ordered[np.concatenate(([True], errors[ordered][1:] < least[:-1]))[: len(ordered)]]
        if len(ordered) > MOST_STATES:
            is_exact = False
            ordered = np.sort(ordered[np.argsort(excess[ordered], kind="stable")[:MOST_STATES]])
        back.append((parents[ordered], picks[ordered]))
        sizes, errors, excess = sizes[ordered], errors[ordered], excess[ordered]
        if not len(sizes):
            return None, is_exact
    best = int(np.argmin(errors))
    if errors[best] > known:
        return None, is_exact
    chosen = [0] * len(fronts)
    for item, (parents, picks) in zip(reversed(order), reversed(back), strict=True):
        chosen[item], best = int(picks[best]), int(parents[best])
    return chosen, is_exact
