"""JSON files: untrusted ones are read up to a size limit, own ones are formatted as transformers formats them."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.limits import JSON_INDEX, JSON_VALUES, read_json_text
from loaders.storage.base import PinnedFiles


def read_json(files: PinnedFiles, name: str, limit: int = JSON_INDEX, values: int = JSON_VALUES) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        BadCheckpoint: the file is missing, longer than `limit` bytes, not JSON of `values` values at most, or no
            object.
    """
    return json_object(files.read_all(name, limit), name, values)


def json_object(raw: bytes, name: str, values: int = JSON_VALUES) -> dict[str, Any]:
    """Parse a JSON object; `name` is the file's, for messages.

    Raises:
        BadCheckpoint: the bytes are not JSON, or not an object.
    """
    try:
        found = read_json_text(raw, values)
    except ValueError as error:
        raise BadCheckpoint(f"{name}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{name}: expected a JSON object, found {type(found).__name__}")
    return found


def json_bytes(document: Any) -> bytes:
    """Return the bytes of a JSON file, formatted as transformers writes them: indented by 2, not escaped to ASCII."""
    text = StringIO()  # takes the text as it is made; `dumps` would hold it in millions of pieces
    json.dump(document, text, indent=2, ensure_ascii=False)
    text.write("\n")
    return text.getvalue().encode()
