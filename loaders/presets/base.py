"""The base of every pydantic model that checks values which a person gave."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FloatName = Literal["float32", "float16", "bfloat16"]


class Spec(BaseModel):
    """A model that converts no types, refuses unknown keys, and cannot be changed."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
