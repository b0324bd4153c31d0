"""The base of every pydantic model that checks values which a person gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict

FloatName = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class PathValue:
    """Marks a setting whose value is a path: relative to where its user stands, and made absolute before it is checked.

    stores: URLs of stores are taken, too. words: values that are no paths.
    """

    stores: bool = False
    words: tuple[str, ...] = ()


LocalPath = Annotated[str, PathValue()]
Location = Annotated[str, PathValue(stores=True)]
Calibration = Annotated[str, PathValue(words=("self",))]


class Spec(BaseModel):
    """A model that converts no types, refuses unknown keys, and cannot be changed."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
