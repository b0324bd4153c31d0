"""The quick check, `pytest -m quick`, which runs only some parameters of tests that have many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some_quick(values: Iterable[Any], *few: Any) -> list[Any]:
    """Return parameters of a test, of which `few` belong to the quick check."""
    return [pytest.param(value, marks=pytest.mark.quick) if value in few else value for value in values]
