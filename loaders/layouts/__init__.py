"""What a consumer expects of an output: names, places, config.json, aux files. One file per consumer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loaders.quantization.scheme import Scheme
from loaders.recipes import Recipe
from loaders.specs import DType, StoredTensor


@dataclass(frozen=True, slots=True)
class Placed:
    """A recipe's result as a layout wants it: by which scheme, and what each role of it is called.

    `cast` is the dtype that the weights take before the scheme sees them, as the engine's own loading would.
    """

    recipe: Recipe
    action: str
    scheme: Scheme
    cast: DType | None
    stored: Mapping[str, StoredTensor]
