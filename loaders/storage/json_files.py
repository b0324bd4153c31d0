"""JSON files of strangers: read within a limit, refused in one line; written sorted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loaders.errors import BadCheckpoint, io_errors

INDEX_LIMIT = 1 << 30


def read_json(path: Path, limit: int = INDEX_LIMIT) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BadCheckpoint: not there, not JSON, not an object, or longer than `limit` bytes.
    """
    with io_errors("reading", path):
        size = path.stat().st_size
        if size > limit:
            raise BadCheckpoint(f"{path.name}: {size} bytes, at most {limit} are read")
        raw = path.read_bytes()
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path.name}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{path.name}: expected a JSON object, found {type(found).__name__}")
    return found


def json_bytes(document: Any) -> bytes:
    """As transformers writes JSON files."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
