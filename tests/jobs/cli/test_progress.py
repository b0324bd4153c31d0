"""The progress display, where there is no terminal."""

from __future__ import annotations

import re
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
