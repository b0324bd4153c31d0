"""What every checked model of values that a person gave is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FloatName = Literal["float32", "float16", "bfloat16"]


class Spec(BaseModel):
    """Strict, closed and frozen."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
