"""JSON files of strangers: read within a limit, refused in one line; written as transformers writes them."""

from __future__ import annotations

import json
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.storage.base import PinnedFiles

INDEX_LIMIT = 1 << 30  # bytes: an index of a million tensors has a tenth of it


def read_json(files: PinnedFiles, name: str, limit: int = INDEX_LIMIT) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BadCheckpoint: not there, not JSON, not an object, or longer than `limit` bytes.
    """
    return json_object(files.read_all(name, limit), name)


def json_object(raw: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        BadCheckpoint: not JSON, or not an object.
    """
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{name}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{name}: expected a JSON object, found {type(found).__name__}")
    return found


def json_bytes(document: Any) -> bytes:
    """The text of a JSON file, as transformers writes them."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
