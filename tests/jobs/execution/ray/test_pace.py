"""When an attempt is stuck, and when it is slow."""

from __future__ import annotations

import pytest

from jobs.execution.ray.pace import END_S, FIRST_S, RANGE_BYTES, STUCK_S, Pace, Progress

pytestmark = pytest.mark.quick
GB = 1 << 30


def attempt(*moves: tuple[float, int], work_bytes: int = GB) -> Progress:
    """An attempt that began at 0 and did so many bytes at such times."""
    made = Progress(0.0, work_bytes)
    for when, size in moves:
        made.moved(size, when)
    return made


def test_before_the_first_bytes_a_minute_is_granted_or_what_the_slowest_has_needed() -> None:
    pace = Pace(1)
    assert not pace.is_stuck(attempt(), FIRST_S)
    assert pace.is_stuck(attempt(), FIRST_S + 1)
    pace.first(100.0)
    assert not pace.is_stuck(attempt(), 150.0)
    assert pace.is_stuck(attempt(), 201.0)


@pytest.mark.parametrize(("threads", "rate", "patience_s"), [(1, GB, STUCK_S), (1, RANGE_BYTES, 20), (4, GB, STUCK_S),
                                                             (4, RANGE_BYTES, 80)])  # fmt: skip
def test_then_it_is_twenty_times_that_of_a_range_at_its_own_rate(threads: int, rate: int, patience_s: float) -> None:
    assert Pace(threads).patience_s(attempt((1.0, rate), work_bytes=100 * GB)) == patience_s


def test_without_a_rate_of_its_own_that_of_others_counts() -> None:
    pace, late = Pace(1), Progress(5.0, GB)
    late.moved(RANGE_BYTES, 5.0)
    pace.ended(RANGE_BYTES, 4.0)
    assert pace.patience_s(late) == 80


def test_while_files_are_synced_or_uploaded_a_unit_gets_its_own_time_again() -> None:
    assert Pace(1).patience_s(attempt((30.0, GB))) == END_S
    assert Pace(1).patience_s(attempt((300.0, GB))) == 300


def test_kernels_that_are_compiled_later_get_the_time_of_the_first() -> None:
    made = attempt((1.0, GB // 2))
    made.is_compiling = True
    assert Pace(1).patience_s(made) == FIRST_S
    made.moved(1, 50.0)
    assert Pace(1).patience_s(made) < FIRST_S


def test_an_attempt_that_begins_again_goes_back() -> None:
    made = attempt((1.0, GB // 2), (2.0, -(GB // 2)))
    assert made.done_bytes == 0
    assert made.rate is None


def test_what_takes_as_long_as_others_is_not_run_twice() -> None:
    pace = Pace(1)
    assert pace.left_s(attempt((50.0, 1)), 100.0) is None  # nothing is known yet
    for _ in range(3):
        pace.ended(GB, 10.0)
    assert pace.left_s(attempt((9.0, GB // 2)), 10.0) is None  # not yet late
    assert pace.left_s(attempt((19.0, GB - 100)), 20.0) is None  # late, and about to end
    assert pace.left_s(attempt((20.0, GB // 4)), 20.0) == pytest.approx(60)
    assert pace.left_s(attempt(), 20.0) == float("inf")
    assert pace.left_s(attempt((20.0, GB // 4), work_bytes=GB * 4), 20.0) is None  # it is larger
