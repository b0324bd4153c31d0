"""The times of files, as the tags of local ones tell them."""

from __future__ import annotations

from loaders.storage.base import Entry, Store


def may_be_newer(store: Store, one: Entry, other: Entry) -> bool:
    """Whether a file may have changed after another: files of folders have times as tags, others have not."""
    first, second = (modified(entry.tag) if store.is_local else None for entry in (one, other))
    return first is None or second is None or first >= second


def modified(tag: str) -> int | None:
    """Return the mtime in nanoseconds with which a local file's tag begins; other tags have none."""
    found = tag.partition(" ")[0]
    return int(found) if found.isdecimal() else None
