"""The base and the common types of all models of a request."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from loaders.presets.base import Calibration, FloatName, LocalPath, Location, Source, Spec

__all__ = ["OUTPUTS", "Calibration", "Columns", "FloatName", "Format", "LocalPath", "Location", "Source", "Spec"]

Format = Literal["text", "json"]
OUTPUTS = "outputs"  # the default of output.root: in the folder where a command is given
Columns = Annotated[
    Literal["fit", "all"],
    Field(description="of tables: what fits the terminal, or all, in parts below each other"),
]


SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?([KMGT])(i?)B", re.IGNORECASE)


def bytes_of(size: str) -> int:
    """Return the bytes of a size that SIZE matches: 5GB is 5e9, 5GiB is 5 * 2**30."""
    match = SIZE.fullmatch(size)
    assert match is not None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2].upper())))
