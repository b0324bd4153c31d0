"""The planner keeps to its budget, is no worse for a larger one, and finds what trying everything finds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.rules import knapsack
from loaders.rules.knapsack import Item, Option, choose, least_size

ERRORS = st.one_of(st.integers(0, 6).map(float), st.floats(0, 1e3, allow_subnormal=False))
OPTIONS = st.lists(st.tuples(st.integers(1, 60), ERRORS), min_size=1, max_size=4)


@st.composite
def problems(draw: st.DrawFn, most: int) -> tuple[list[Item], int]:
    items = [
        Item(str(number), tuple(Option(str(at), size, error) for at, (size, error) in enumerate(options)))
        for number, options in enumerate(draw(st.lists(OPTIONS, min_size=1, max_size=most)))
    ]
    return items, least_size(items) + draw(st.integers(0, 30 * len(items)))


def by_trying(items: list[Item], budget: int) -> float:
    mixes = itertools.product(*(item.options for item in items))
    return min(sum(o.error for o in mix) for mix in mixes if sum(o.size for o in mix) <= budget)


@settings(max_examples=150, deadline=None)
@given(problems(5))
def test_it_finds_what_trying_everything_finds(problem: tuple[list[Item], int]) -> None:
    items, budget = problem
    best, found = by_trying(items, budget), choose(items, budget)
    assert found.is_optimal
    assert found.gap == 0.0
    assert found.size <= budget
    # sums in another order
    assert found.error == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert found.bound <= best + 1e-9 * (1 + best)


@settings(max_examples=60, deadline=None)
@given(problems(40), st.integers(0, 200))
def test_a_larger_budget_loses_no_more(problem: tuple[list[Item], int], more: int) -> None:
    items, budget = problem
    small, large = choose(items, budget), choose(items, budget + more)
    assert small.size <= budget
    assert large.size <= budget + more
    assert large.error <= small.error * (1 + 1e-9) + 1e-12
    for item, option in zip(items, small.options, strict=True):
        assert option in item.options


@settings(max_examples=40, deadline=None)
@given(problems(12))
def test_with_little_memory_the_gap_covers_what_is_lost(problem: tuple[list[Item], int]) -> None:
    items, budget = problem
    best = choose(items, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "MOST_STATES", 2)
        found = choose(items, budget)
    assert found.size <= budget
    assert best.error <= found.error * (1 + 1e-9) + 1e-12
    assert found.error * (1 - found.gap) <= best.error * (1 + 1e-9) + 1e-9


@pytest.mark.quick
def test_a_budget_that_cannot_be_met_is_refused() -> None:
    items = [Item("a", (Option("small", 10, 1.0), Option("large", 20, 0.5)))]
    with pytest.raises(ValueError, match="the least possible is 10"):
        choose(items, 9)
