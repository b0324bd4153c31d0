"""Engines that tests run, imported as the code under test imports them."""

from __future__ import annotations

from importlib import util
from typing import Any

import pytest


def mlx_lm_or_skip() -> Any:
    """Return mlx_lm.utils; without mlx-lm, skip the test, or the whole file if called at its top."""
    if util.find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed", allow_module_level=True)
    from loaders.models.foreign import mlx_lm_utils

    return mlx_lm_utils()
