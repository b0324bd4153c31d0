"""What every checked model of a request is made of."""

from __future__ import annotations

from typing import Literal

from loaders.presets.base import FloatName, Spec

__all__ = ["FloatName", "Format", "Spec"]

Format = Literal["text", "json"]
