"""Journals that interrupted jobs left next to their outputs, and the logits that verify=logits keeps there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.output.journal import LOGITS
from loaders.errors import BadSpec, StorageError
from loaders.storage import StoreKind, kind_of, open_store
from loaders.storage.address import Address
from loaders.storage.base import Abandoned
from loaders.storage.folder_destination import left_in


def find_leftovers(place: Address, output: str | None = None) -> tuple[Abandoned, ...]:
    """Find the leftovers in a folder of outputs: of all outputs, or of one by its name.

    Raises:
        BadSpec: the address can only be read.
    """
    found = _writable(place).abandoned(place, output)
    logits = place / LOGITS
    if output is None and place.is_local and open_store(logits).absence() is None:
        found = (*found, left_in(logits.path))
    return found


def _writable(place: Address) -> StoreKind:
    kind = kind_of(place)
    if kind.destination is None:
        raise BadSpec(f"{place}: {place.scheme}:// can be read, not written")
    return kind


def remove(found: Sequence[Abandoned]) -> None:
    """Remove the leftovers that no process holds.

    Raises:
        StorageError: some cannot be removed; the others are.
    """
    failures = []
    for leftover in found:
        if not leftover.is_held:
            try:
                _writable(leftover.address).discard(leftover.address)
            except StorageError as error:
                failures.append(str(error))
    if failures:
        raise StorageError("; ".join(failures))


def leftover_document(leftover: Abandoned, *, will_remove: bool) -> dict[str, Any]:
    """Describe a leftover as JSON. `status` is "removed", "in use", or without removal "abandoned" or "kept"."""
    is_cache = leftover.address.name == LOGITS  # a cache, which is kept on purpose
    left = "removed" if will_remove else "kept" if is_cache else "abandoned"
    return {
        "path": str(leftover.address),
        "bytes": leftover.size,
        "units_done": leftover.units_done,
        "age_s": leftover.age_s,
        "status": "in use" if leftover.is_held else left,
    }
