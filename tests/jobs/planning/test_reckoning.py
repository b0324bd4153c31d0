"""Reckoning a job's time: what binds it, and that more machines help only there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.planning.reckoning import Fixed, Load, Machines, Part, reckon

pytestmark = pytest.mark.quick

ONE = Machines(count=1, units_at_once=1, threads=4, cpus=4, read_rate=1e9, write_rate=1e9)
NOTHING = Fixed(start_s=0, unit_s=0, driver_s=0, end_s=0)
UNITS = [Load(read=1e9, cpu_s=8.0, written=0.5e9)] * 12  # 1 s of reading, 2 s of four CPUs, half a second of writing


def test_a_machine_reads_while_it_computes_and_then_writes() -> None:
    found = reckon(UNITS, ONE, NOTHING)
    assert found.seconds == pytest.approx(12 * 2.5)
    assert (found.parts["reading"], found.parts["cpu"], found.parts["writing"]) == pytest.approx((12, 24, 6))
    assert found.bottleneck == "cpu"


def test_units_of_one_machine_share_what_it_reads() -> None:
    side = replace(ONE, units_at_once=4, threads=4, cpus=64)
    found = reckon(UNITS, side, NOTHING)
    assert found.seconds == pytest.approx(3 * 4)  # four at once, of which each reads a quarter of a GB/s
    assert found.bottleneck == "reading"


def test_three_machines_take_a_third_and_each_reads_a_third() -> None:
    found = reckon(UNITS, replace(ONE, count=3), NOTHING)
    assert found.seconds == pytest.approx(10)
    assert found.read == (4e9, 4e9)
    assert found.written == (2e9, 2e9)


@pytest.mark.parametrize(
    ("units", "machines", "fixed", "bound"),
    [
        (UNITS, replace(ONE, write_rate=0.1e9), NOTHING, "writing"),
        # Twelve units keep twelve of a hundred machines busy.
        (UNITS, replace(ONE, count=100), NOTHING, "tail"),
        ([Load(1e6, 0.01, 1e6)] * 10_000, replace(ONE, count=100), replace(NOTHING, driver_s=0.002), "driver"),
        (UNITS[:1], ONE, replace(NOTHING, start_s=7), "start"),
        (UNITS[:1], ONE, replace(NOTHING, end_s=7), "end"),
    ],
)
def test_what_binds_is_named(units: list[Load], machines: Machines, fixed: Fixed, bound: Part) -> None:
    assert reckon(units, machines, fixed).bottleneck == bound


def test_half_a_cpu_takes_twice_as_long() -> None:
    one, half = (reckon(UNITS, replace(ONE, threads=1, cpus=cpus), NOTHING) for cpus in (1, 0.5))
    assert half.parts["cpu"] == pytest.approx(2 * one.parts["cpu"])


def test_a_driver_that_is_slower_than_all_machines_decides() -> None:
    found = reckon([Load(1e3, 1e-6, 1e3)] * 1000, replace(ONE, count=50), replace(NOTHING, driver_s=0.01, start_s=1))
    assert found.seconds == pytest.approx(11, rel=1e-3)
