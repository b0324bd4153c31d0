"""The base and the common types of all models of a request."""

from __future__ import annotations

from typing import Literal

from loaders.presets.base import Calibration, FloatName, LocalPath, Location, Source, Spec

__all__ = ["Calibration", "FloatName", "Format", "LocalPath", "Location", "Source", "Spec"]

Format = Literal["text", "json"]
