"""How a model of sentence-transformers makes one vector of a text's: llama.cpp's pooling_type.

It is found as in llama.cpp's converter (_try_set_pooling_type in conversion/base.py).
"""

from __future__ import annotations

import json
from typing import Any

from loaders.containers.gguf import MetadataValue, uint32
from loaders.errors import BadCheckpoint, BadSpec
from loaders.layouts.gguf.keys.encoders import POOLINGS
from loaders.storage.base import PinnedFiles
from loaders.storage.json_files import read_json

MODULES = "modules.json"
LIMIT = 1 << 20
# what llama.cpp computes of a model of sentence-transformers; it always normalizes
COMPUTED = ("Transformer", "Pooling", "Normalize")
SETTINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}


def pooling_metadata(files: PinnedFiles, architecture: str) -> tuple[dict[str, MetadataValue], list[str]]:
    """Return the key of the pooling, and the modules that a GGUF has no place for; nothing where modules.json is not.

    Raises:
        BadCheckpoint: modules.json or the pooling's file are not as sentence-transformers writes them.
        BadSpec: llama.cpp has no such pooling.
    """
    if files.find(MODULES) is None:
        return {}, []
    modules = _modules(files)
    left_out = [f"{kind} of {MODULES} ({path})" for kind, path in modules if kind not in COMPUTED]
    for kind, path in modules:
        if kind == "Pooling":
            settings = read_json(files, f"{path}/config.json" if path else "config.json", LIMIT)
            found = next((mode for key, mode in SETTINGS.items() if settings.get(key)), settings.get("pooling_mode"))
            if found not in POOLINGS:
                raise BadSpec(f"{path}/config.json: llama.cpp pools by {', '.join(POOLINGS)}; none of them is set here")
            return {f"{architecture}.pooling_type": uint32(POOLINGS[found])}, left_out
    return {}, left_out


def _modules(files: PinnedFiles) -> list[tuple[str, str]]:
    """Return each module's class, without its package, and its folder."""
    try:
        found: Any = json.loads(files.read_all(MODULES, LIMIT))
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{MODULES}: not JSON ({error})") from None
    is_right = isinstance(found, list) and all(
        isinstance(each, dict) and isinstance(each.get("type"), str) and isinstance(each.get("path"), str)
        for each in found
    )
    if not is_right:
        raise BadCheckpoint(f"{MODULES}: expected a list of modules with type and path, found {str(found)[:80]}")
    for each in found:
        if ".." in each["path"].split("/") or each["path"].startswith("/"):
            raise BadCheckpoint(f"{MODULES}: expected a folder of the checkpoint as path, found {each['path']!r}")
    return [(each["type"].rpartition(".")[2], each["path"].strip("/")) for each in found]
