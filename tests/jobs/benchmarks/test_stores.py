"""`weightmill bench stores`, in small."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks import stores
from jobs.benchmarks.range_server import serving
from tests.making import write_checkpoint


def test_a_job_is_timed_beside_plain_reads(tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "HEADERS", 700)
    source = write_checkpoint(tmp_path / "source", shards=2)
    ran = weightmill("bench", "stores", f"model.path={source}", "repeats=1", "rate=50", "format=json")
    assert ran.status == 0, ran.err
    found = ran.document
    assert len(found["plain_s"]) == len(found["run_s"]) == len(found["job_s"]) == 1
    assert set(found["bound_by"]) <= {"fetch", "encode"}
    assert found["plan"]["files"] == 2
    assert 0 < found["plan"]["requests"] < 200  # most look for files by their usual names
    assert found["plan"]["bytes"] < 2_000_000 < found["plan"]["source_bytes"]


def test_the_server_gives_ranges_and_counts_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with serving(tmp_path, None) as served:
        asked = urllib.request.Request(f"{served.url}/file", headers={"Range": "bytes=10-19"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert answer.status == 206
            assert answer.read() == bytes(range(10, 20))
        with urllib.request.urlopen(f"{served.url}/file", timeout=30) as answer:
            assert answer.read() == bytes(range(100))
        assert served.counts() == {"requests": 2, "bytes": 110}
        assert served.counts() == {"requests": 0, "bytes": 0}
