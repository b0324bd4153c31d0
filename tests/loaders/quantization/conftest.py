"""Fixtures for schemes."""

from __future__ import annotations

import pytest

import loaders.backends.threads


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of a few hundred weights, so that small tensors have many."""
    monkeypatch.setattr(loaders.backends.threads, "RANGE", 300)
