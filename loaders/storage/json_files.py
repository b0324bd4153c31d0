"""JSON files: untrusted ones are read up to a size limit, own ones are formatted as transformers formats them."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.storage.base import PinnedFiles

# The most bytes of JSON that are read. An index of a million tensors has about a tenth of it, and a hostile file cannot
# take more memory than this.
INDEX_LIMIT = 1 << 30


def read_json(files: PinnedFiles, name: str, limit: int = INDEX_LIMIT) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        BadCheckpoint: the file is missing, longer than `limit` bytes, not JSON, or not an object.
    """
    return json_object(files.read_all(name, limit), name)


def json_object(raw: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object; `name` is the file's, for messages.

    Raises:
        BadCheckpoint: the bytes are not JSON, or not an object.
    """
    try:
        found = json.loads(raw)
    # A hostile file can nest deeper than Python's parser recurses.
    except (ValueError, RecursionError) as error:
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
