"""Tables that come with the program: YAML and JSON files beside the modules that read them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

# libyaml reads the same some ten times faster, where it is there; both are safe loaders.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def table(path: Path) -> Any:
    """Return a file's contents, which are read once."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else parsed(text)


def parsed(text: str) -> Any:
    """Return what a text of YAML says."""
    return yaml.load(text, Loader=_LOADER)  # noqa: S506  # see _LOADER
