"""Engines that tests run, as the product imports them."""

from __future__ import annotations

from importlib import util
from typing import Any

import pytest


def mlx_lm_or_skip() -> Any:
    """mlx_lm.utils; the test, or the file at whose top this stands, is skipped where it is not installed."""
    if util.find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed", allow_module_level=True)
    from loaders.models.mlx_modules import mlx_lm_utils

    return mlx_lm_utils()
