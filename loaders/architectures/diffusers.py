"""The model classes of diffusers: which matrices of a transformer, a UNet or a VAE are nn.Linear layers.

diffusers with bitsandbytes makes a quantized layer of every nn.Linear, heads and patch embeddings too, except in
modules that the class keeps in float32 (`_keep_in_fp32_modules`) and those that a skip list names. Nearly all matrices
are nn.Linear; tables for lookups are told by their names. diffusers.json has a row for each class of diffusers 0.42
that could be looked at, with what names do not tell: `python -m tests.diffusers_classes` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.tables import table

PATH = Path(__file__).with_name("diffusers.json")
TABLE = re.compile(
    r"(?:^|[._])(?:embed|embeds|embedding|embeddings|embedding_table|wte|wpe)\.weight$"
    r"|(?:^|\.)embed_(?:tokens|positions)\.weight$"
)
NUMBER = re.compile(r"[0-9]+")


def class_of(config: Mapping[str, Any]) -> str | None:
    """Return the class of diffusers that a config.json or a model_index.json names; None if it names none."""
    found = config.get("_class_name")
    return found if isinstance(found, str) and not config.get("model_type") else None


def is_table_by_name(name: str) -> bool:
    """Whether a matrix is a table for lookups, as far as its name tells."""
    return TABLE.search(name) is not None


def _rows() -> Mapping[str, Mapping[str, list[str]]]:
    found: Mapping[str, Mapping[str, list[str]]] = table(PATH)
    return found


@dataclass(frozen=True, slots=True)
class DiffusersClass:
    """A model class of diffusers by its name, and what is known of its matrices."""

    name: str

    @property
    def is_known(self) -> bool:
        """Whether diffusers.json has a row for the class."""
        return self.name in _rows()

    def role(self, weight: str) -> str:
        """Return the role of a matrix called weight: see `loaders.architectures.family.ROLES`."""
        row, module = _rows().get(self.name, {}), weight.removesuffix(".weight")
        form = NUMBER.sub("N", module)
        if form in row.get("others", ()):
            return "other"
        if is_table_by_name(weight) and form not in row.get("linear", ()):
            return "embedding"
        return "sensitive" if is_skipped(module, row.get("float32", ())) else "linear"


def is_skipped(module: str, skip: Collection[str]) -> bool:
    """Whether diffusers leaves a module alone: _replace_with_bnb_linear in quantizers/bitsandbytes/utils.py.

    An entry is a module's own name, wherever it is, or its path, or a part of a path that a dot follows.
    """
    return module.rpartition(".")[2] in skip or any(f"{entry}." in module or entry == module for entry in skip)
