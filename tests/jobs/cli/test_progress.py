"""The progress display, where there is no terminal."""

from __future__ import annotations

import io
import re
import time
from itertools import count

import pytest

from jobs.cli import progress
from jobs.cli.progress import Meter
from loaders.storage.traffic import traffic


@pytest.mark.quick
def test_a_line_says_what_stores_gave_and_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count(100.0, 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with Meter("quantizing", 400_000_000) as meter:
        meter.add(100_000_000)
        assert ";" not in capsys.readouterr().err
        traffic("a host").moved(fetched=300_000_000)
        traffic("another").moved(uploaded=50_000_000)
        meter.add(100_000_000)
    said = capsys.readouterr().err
    assert re.search(
        r"quantizing: 50% of 0\.40 GB, .*; fetched 0\.30 GB at [\d.]+ MB/s, uploaded 50\.0 MB at [\d.]+ MB/s\n", said
    )


@pytest.mark.quick
def test_never_is_more_than_all_done_nor_less_than_no_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count(100.0, 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with Meter("quantizing", 100_000_000) as meter:
        meter.add(557_000_000)
    said = capsys.readouterr().err
    assert "quantizing: 100% of 0.56 GB" in said
    assert "left" not in said


class Starting:
    """Workers that start, until they do something."""

    has_begun = False

    def starting(self) -> str:
        return "" if self.has_begun else "units start on two machines"

    def summary(self) -> str:
        return "2 machines"

    def machines(self) -> list[str]:
        return ["h1: 1 unit in flight", "h2: 2 units in flight"]


def test_while_workers_start_it_says_where_and_no_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.02)
    monkeypatch.setattr(progress, "LINE_S", 0.02)
    monkeypatch.setattr(progress, "LOOK_S", 0.005)
    watched = Starting()
    with Meter("quantizing", 400_000_000, watched=watched) as meter:
        time.sleep(0.2)  # nothing is added: the line comes by itself
        meter.add(0)
        said = capsys.readouterr().err
        assert "quantizing: units start on two machines\n" in said
        assert "%" not in said
        watched.has_begun = True
        meter.add(100_000_000)
        time.sleep(0.1)
    said = capsys.readouterr().err
    assert re.search(r"quantizing: 25% of 0\.40 GB, .*; 2 machines\n", said)


def test_on_a_terminal_machines_stand_below_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, watched = Terminal(), Starting()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "LOOK_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    with Meter("quantizing", 400_000_000, watched=watched) as meter:
        assert [str(line) for line in meter._below()] == ["  units start on two machines"]
        watched.has_begun = True
        meter.add(1)
        assert meter._bar is not None
        meter._bar.refresh()
    assert "h2: 2 units in flight" in terminal.getvalue()
