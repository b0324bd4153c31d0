"""Writes loaders/architectures/diffusers.json from the model classes of the installed diffusers.

    python -m tests.diffusers_classes

Every class that its own defaults can build is built without weights, and its matrices are held against what their names
say. The table has a row for each class: what its names do not tell, and which modules the class keeps in float32.
Read the difference before you commit it: each row decides what is quantized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loaders.architectures.diffusers import PATH, is_table_by_name

Row = dict[str, list[str]]


def row_of(cls: Any, model: Any) -> Row:
    """Return the row of a class. `model` is one without weights, or None if its own defaults cannot build it."""
    import torch

    row: Row = {}
    if cls._keep_in_fp32_modules:
        row["float32"] = list(cls._keep_in_fp32_modules)
    modules = {} if model is None else dict(model.named_modules())
    for name, module in modules.items():
        shape = getattr(getattr(module, "weight", None), "shape", ())
        is_linear = isinstance(module, torch.nn.Linear)
        if len(shape) == 2 and is_linear == is_table_by_name(f"{name}.weight"):
            key, pattern = ("linear" if is_linear else "others"), re.sub(r"[0-9]+", "N", name)
            if pattern not in row.setdefault(key, []):
                row[key].append(pattern)
    return row


def rows() -> Mapping[str, Row]:
    """Return the rows of all model classes of the installed diffusers that can be built."""
    import diffusers
    from accelerate import init_empty_weights

    found: dict[str, Row] = {}
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name, None)
        if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin) or cls is diffusers.ModelMixin:
            continue
        try:
            with init_empty_weights():
                model = cls()
        except (TypeError, ValueError, AssertionError):  # what a class without defaults raises
            if not cls._keep_in_fp32_modules:
                continue
            model = None
        found[name] = row_of(cls, model)
    return found


if __name__ == "__main__":
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows().items())
    Path(PATH).write_text("{\n" + lines + "\n}\n")
