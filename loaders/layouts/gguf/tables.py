"""The tables of this folder: YAML and JSON files that come with the program."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def table(name: str) -> Any:
    """Return a file's contents. JSON is YAML, too."""
    return yaml.load(Path(__file__).with_name(name).read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506  # safe


# libyaml reads the same some ten times faster, where it is there
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
