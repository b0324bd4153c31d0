"""Fixtures for sources that are decoded by rows and columns."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.quantization import boxes


@pytest.fixture(params=[1 << 20, 100], ids=["large boxes", "small boxes"])
def box(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "BOX", request.param)
