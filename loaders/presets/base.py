"""The base of the pydantic models that validate a user's values, and the types of path settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer

from loaders.storage.address import Address

FloatName = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class PathValue:
    """A mark of settings whose value is a path: relative to the user's working folder, made absolute before validation.

    stores: whether URLs of stores are accepted too. words: values that are keywords instead of paths. is_read: whether
    it is something to read, so that OWNER/NAME is a repository of the Hub if no folder is meant.
    """

    stores: bool = False
    is_read: bool = False
    words: tuple[str, ...] = ()


def _shown(path: str | None) -> str | None:
    return path and Address.of(path).shown


LocalPath = Annotated[str, PathValue()]
# Where a request is written down (reports, tracking, journals), URLs stand there without their secrets.
Location = Annotated[str, PathValue(stores=True), PlainSerializer(_shown)]
Source = Annotated[str, PathValue(stores=True, is_read=True), PlainSerializer(_shown)]
Calibration = Annotated[str, PathValue(words=("self",))]


class Spec(BaseModel):
    """The base of all settings: it converts no types, refuses unknown keys, and is immutable."""

    # A model's validator is built when it first validates: a verb's own, of all that are defined.
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)
