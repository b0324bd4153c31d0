"""What interrupted jobs left in a bucket: journals, files of outputs that are not complete, uploads under way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from loaders.errors import StorageError
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT, Abandoned
from loaders.storage.objects.answers import Missing
from loaders.storage.objects.claim import STALE_S, has_ended, owner_of
from loaders.storage.objects.client import Found, ObjectClient, client_of
from loaders.storage.objects.parts import Upload
from loaders.storage.objects.store import HIDDEN, ObjectStore, say_once

UPLOADS = "uploads"  # stands in an address for uploads under way that no journal knows


def abandoned_at(place: Address, name: str | None = None) -> tuple[Abandoned, ...]:
    """List journals at an address of outputs, and uploads under way there: of all outputs, or of one by its name."""
    client, top = client_of(place)
    prefix = "/".join(part for part in (top, name or "") if part)
    rows = client.patient(client.what("listing", prefix), lambda: _listed(client, prefix))
    below = f"{top}/" if top else ""
    pattern = re.compile(rf"([^/]+)/{re.escape(HIDDEN)}([0-9a-f]{{12}})/(.+)")
    journals: dict[tuple[str, str], list[tuple[str, Found]]] = {}
    for row in rows:
        match = pattern.fullmatch(row.key.removeprefix(below))
        if match is not None:
            journals.setdefault((match[1], match[2]), []).append((match[3], row))
    uploads: dict[str, list[Upload]] = {}
    for each in uploads_below(place if name is None else place / name):
        uploads.setdefault(each.key.removeprefix(below).partition("/")[0], []).append(each)
    sizes = {row.key.removeprefix(below): row.size for row in rows}
    found = [
        _abandoned(
            client,
            place / output / f"{HIDDEN}{key}",
            files,
            _published(output, files, sizes) + sum(each.size for each in uploads.pop(output, [])),
        )
        for (output, key), files in sorted(journals.items())
    ]
    # Uploads to what is no output of ours are somebody else's.
    ours = {row.key.removeprefix(below).partition("/")[0] for row in rows if row.key.endswith(f"/{OUR_REPORT}")}
    found += [_begun(place / output, each) for output, each in sorted(uploads.items()) if output in ours]
    return tuple(found)


def _begun(output: Address, uploads: Sequence[Upload]) -> Abandoned:
    return Abandoned(
        address=output / f"{HIDDEN}{UPLOADS}",
        size=sum(each.size for each in uploads),
        units_done=0,
        age_s=max(0.0, time.time() - max(each.began.timestamp() for each in uploads)),
        is_held=False,
    )


def _published(output: str, files: Sequence[tuple[str, Found]], sizes: Mapping[str, int]) -> int:
    """Return the bytes of an incomplete output's files under their final names, which `discard` removes, too."""
    if f"{output}/{OUR_REPORT}" in sizes:
        return 0
    kept = (name.removeprefix("kept/") for name, _ in files if name.startswith("kept/"))
    return sum(sizes.get(f"{output}/{name}", 0) for name in kept)


def _listed(client: ObjectClient, prefix: str) -> list[Found]:
    try:
        return client.list(prefix)
    except Missing:
        return []


def _abandoned(
    client: ObjectClient, journal: Address, files: Sequence[tuple[str, Found]], elsewhere_bytes: int
) -> Abandoned:
    now = max(time.time(), *(row.changed.timestamp() for _, row in files))
    age_s = now - max(row.changed.timestamp() for _, row in files)
    claim = next((row for name, row in files if name == "claim"), None)
    # Clocks may differ; "held" is the answer that deletes nothing.
    is_held = claim is not None and time.time() - claim.changed.timestamp() < STALE_S
    return Abandoned(
        address=journal,
        size=sum(row.size for _, row in files) + elsewhere_bytes,
        units_done=sum(name.startswith("records/") for name, _ in files),
        age_s=age_s,
        is_held=is_held and not has_ended(owner_of(client, claim)),
        ages_s={name: now - row.changed.timestamp() for name, row in files if "/" not in name},
    )


def discard(journal: Address) -> None:
    """Remove what an interrupted job left: its journal, its uploads, and its files unless the output is complete.

    Raises:
        StorageError: it cannot be removed.
    """
    output = journal.parent.parent
    client = client_of(output)[0]
    for each in uploads_below(output):
        abort(client, each)
    if journal.name == UPLOADS:
        return
    if ObjectStore(output).find(OUR_REPORT) is None:
        store = ObjectStore(journal / "kept")
        keys = [client_of(output / entry.name)[1] for entry in store.list(every=True)]
        client.patient(client.what("removing", output.name), lambda: client.delete(keys))
    remove_journal(journal, lambda name: True)


def remove_journal(journal: Address, is_meant: Callable[[str], bool]) -> None:
    """Remove the objects of a journal. The newest goes last, which says how far the job had come."""
    client, prefix = client_of(journal)
    rows = client.patient(client.what("listing", prefix), lambda: _listed(client, prefix))
    names = {row.key.removeprefix(f"{prefix}/"): row for row in rows}
    order = sorted(names, key=lambda name: ("/" not in name, names[name].changed, name))
    keys = [names[name].key for name in order if is_meant(name)]
    client.patient(client.what("removing", prefix), lambda: client.delete(keys))


def uploads_below(below: Address) -> list[Upload]:
    """List the uploads in parts under way below an address; none where they cannot be listed, which is said."""
    client, prefix = client_of(below)
    if not client.has_parts:
        return []
    what = client.what("listing uploads of", prefix)
    try:
        return client.in_parts(what, lambda parts: parts.left(prefix))
    except (StorageError, Missing) as error:
        say_once(f"{error}; let a rule of the bucket remove uploads that are not completed")
        return []


def abort(client: ObjectClient, each: Upload) -> None:
    # It was completed or aborted meanwhile.
    with suppress(Missing):
        client.in_parts(client.what("aborting", each.key), lambda parts: parts.abort(each.key, each.id))
