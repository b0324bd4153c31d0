"""llama.cpp's names of tensors: for each architecture, the modules of checkpoints and what a GGUF calls them.

The table is gguf-py's (gguf/constants.py, gguf/tensor_mapping.py); `python -m tests.gguf_names` takes it from there,
and a test holds it against the installed version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from loaders.tables import table

NAMES_FILE = Path(__file__).with_name("gguf_names.json")
LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _tables() -> Mapping[str, Any]:
    found: Mapping[str, Any] = table(NAMES_FILE)
    return found


@cache
def _names(architecture: str) -> Mapping[str, str]:
    """Return GGUF's names by the names of modules, with {} for a layer's number.

    Of two kinds of tensors that have a module's name in common, the later one has it, as in gguf-py.
    """
    tables, found = _tables(), {}
    own = tables["own"].get(architecture, {})
    kinds = {*tables["architectures"][architecture]}
    for kind in (kind for kind in tables["tensors"] if kind in kinds):
        for module in (tables["tensors"][kind], *own.get(kind, tables["modules"].get(kind, ()))):
            found[module] = tables["tensors"][kind]
    return found


def tensor_names(architecture: str) -> tuple[str, ...]:
    """Return GGUF's names of an architecture's tensors, with {} for a layer's number; none if it is unknown."""
    tables = _tables()
    return tuple(tables["tensors"][kind] for kind in tables["architectures"].get(architecture, ()))


def gguf_name(architecture: str, name: str) -> str | None:
    """Return GGUF's name of a checkpoint's tensor, or None if the architecture has no such tensor."""
    for suffix in ("", ".weight", ".bias"):
        module = name.removesuffix(suffix)
        if suffix and module == name:
            continue
        # The first number is the layer's; the names have no other.
        layer = LAYER.search(module)
        form = module if layer is None else f"{module[: layer.start()]}{{}}{module[layer.end() :]}"
        found = _names(architecture).get(form)
        if found is not None and (suffix or not found.endswith("_exps")):  # a stack that is not cut has no place
            return found.replace("{}", layer[0] if layer else "") + suffix
    return None
