"""The limit to what a process reads of weights: its pace, and that every strategy of jobs keeps to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.storage import local, read_limit
from loaders.storage.read_limit import Bucket
from loaders.storage.settings import current, use
from loaders.strategies import loader
from tests.making import write_checkpoint

pytestmark = pytest.mark.quick


def test_what_is_read_takes_its_time_and_no_reserve_gathers() -> None:
    clock = [100.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    bucket = Bucket(lambda: clock[0], sleep)
    for _ in range(5):
        bucket.take(10, limit=100)
    assert clock[0] == pytest.approx(100.4)  # the last has yet to have its own time
    clock[0] += 1000
    for _ in range(5):
        bucket.take(10, limit=100)
    assert clock[0] == pytest.approx(1100.8)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of what was taken from the bucket, under a limit that lets all pass."""
    found: list[int] = []
    monkeypatch.setattr(read_limit._bucket, "take", lambda size, limit: found.append(size))
    before = current()
    use(replace(before, read_limit=1e9))
    yield found
    use(before)


@pytest.mark.parametrize("name", ["lazy", "read", "multithread", "streaming", "remote"])
def test_every_strategy_of_jobs_takes_what_it_reads(
    name: str, taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "cached_part", lambda descriptor, start, stop: 0.0)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source", shards=1))
    specs = checkpoint.weights
    with loader(name).open(checkpoint.source, specs) as reader:
        for spec in specs:
            reader.read(spec, 0, spec.size)
    wanted = sum(spec.size for spec in specs)
    # What is fetched ahead into the page cache is read again there, if the cache forgets it, as here.
    assert wanted <= sum(taken) <= 2 * wanted


def test_what_the_page_cache_holds_is_not_counted(
    taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "cached_part", lambda descriptor, start, stop: 1.0)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source", shards=1))
    for name in ("lazy", "read", "multithread"):
        with loader(name).open(checkpoint.source, checkpoint.weights) as reader:
            for spec in checkpoint.weights:
                reader.read(spec, 0, spec.size)
    assert taken == []
