"""Arguments that are paths: what exists under the very name that was typed is meant, whatever characters it has."""

from __future__ import annotations

import os

from pydantic import BaseModel

from jobs.cli.compose import choices_of
from jobs.cli.validation import fields_of


def bare_value(word: str, verb: str, spec: type[BaseModel], *, only_paths: bool = False) -> str | None:
    """Return what an argument without a key means: a path that exists, made absolute, or the word itself.

    None for options and settings. With `only_paths`, of a verb that needs no path, settings are settings even where a
    folder has that name (./NAME is the folder), and words without a slash that do not exist are none either.
    """
    if word.startswith("-"):
        return None
    key, equals, _ = word.partition("=")
    if only_paths and equals and "/" not in key and _is_setting(key.lstrip("+~"), verb, spec):
        return None
    if os.path.lexists(word):
        return os.path.abspath(word)
    if word.startswith("~") or (equals and "/" not in key.removeprefix("hydra/")):
        return None
    return None if only_paths and "/" not in word else word


def _is_setting(key: str, verb: str, spec: type[BaseModel]) -> bool:
    first = key.split(".", maxsplit=1)[0].split("/", maxsplit=1)[0]
    return first == "hydra" or key in choices_of(verb) or key in {name for name, _ in fields_of(spec)}
