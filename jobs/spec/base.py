"""The base and the common types of all models of a request."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from loaders.presets.base import Calibration, FloatName, LocalPath, Location, Source, Spec

__all__ = ["Calibration", "Columns", "FloatName", "Format", "LocalPath", "Location", "Source", "Spec"]

Format = Literal["text", "json"]
Columns = Annotated[
    Literal["fit", "all"],
    Field(description="of tables: what fits the terminal, or all, in parts below each other"),
]
