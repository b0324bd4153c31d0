"""An unpublished output in a bucket. Nothing can be renamed, so finished files have their final names at once.

OUT/.weightmill/KEY/    the journal; KEY names the plan
    begun               it exists
    claim               see objects/claim.py
    kept/NAME           an empty object for each file that was written to OUT/NAME, made before that is
    replaced            the files of the output that is being replaced
    staged/ order       the files that are written last, and their order: without them nobody takes OUT for a checkpoint
    pieces/ records/    see `Destination`

Files are written to local scratch and uploaded from there. Uploads in parts that are under way below OUT are taken for
the job's own: they are aborted when the journal is removed.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from loaders.errors import BadSpec, StorageError, io_errors
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT, Entry, Range, Store
from loaders.storage.hashes import hash_stored
from loaders.storage.objects.answers import Unmet
from loaders.storage.objects.assembly import Copied, Source, assemble
from loaders.storage.objects.claim import ObjectClaim
from loaders.storage.objects.client import ObjectClient, client_of
from loaders.storage.objects.leftovers import abort, remove_journal, uploads_below
from loaders.storage.objects.store import HIDDEN, ObjectStore, found_at, read_object
from loaders.storage.objects.upload import file_blocks, size_of, upload
from loaders.storage.ownership import make_own
from loaders.storage.settings import current
from loaders.storage.with_staged import WithStaged

SIGNS = ("config.json", "model_index.json", OUR_REPORT)  # without which nobody takes files for a checkpoint
SCRATCH = "weightmill-upload"
SMALL = 64 << 20  # bytes: files of the journal are no longer


class ObjectDestination:
    """A `Destination` in a bucket."""

    is_local = False

    def __init__(self, address: Address, key: str) -> None:
        self.address = address
        self.journal = address / f"{HIDDEN}{key[:12]}"
        self._claim = ObjectClaim(*client_of(self.journal / "claim"))
        self._name = key[:12]

    @property
    def assembles(self) -> bool:
        return self.address.scheme == "s3"

    @property
    def _client(self) -> ObjectClient:
        return client_of(self.address)[0]

    def _key(self, name: str) -> str:
        area, _, rest = name.partition("/")
        return client_of(self.address / rest if area == "files" else self.journal / name)[1]

    @property
    def files(self) -> Store:
        return WithStaged(ObjectStore(self.address), ObjectStore(self.journal / "staged"))

    @property
    def pieces(self) -> Store:
        return ObjectStore(self.journal / "pieces")

    def prepare(self, *, overwrite: bool) -> None:
        _remove_stale_scratch()
        self.put("begun", b"")
        if not overwrite:
            return
        # New files will replace the old output's one by one. Without these, no reader takes the mixture for a
        # checkpoint; the others are noted, so that those that are not replaced can be removed.
        there = ObjectStore(self.address).list()
        if any(entry.name == OUR_REPORT for entry in there):
            self.put("replaced", json.dumps([entry.name for entry in there]).encode())
        for name in SIGNS:
            self.drop(f"files/{name}")

    def is_there(self) -> bool:
        return found_at(self._client, self._key("begun")) is not None

    def claim(self) -> AbstractContextManager[str | None]:
        return self._claim.held()

    def put(self, name: str, data: bytes) -> None:
        self._claim.check()
        self._note(name)
        what, key = self._client.what("writing", self._key(name)), self._key(name)
        self._client.patient(what, lambda: self._client.put(key, data))

    def _note(self, name: str) -> None:
        """Note that a file of the output is this job's."""
        if name.startswith("files/"):
            self.put(f"kept/{name.removeprefix('files/')}", b"")

    def get(self, name: str) -> bytes | None:
        key = self._key(name)
        found = found_at(self._client, key)
        if found is None or found.size > SMALL:
            return None
        return bytes(read_object(self._client, key, Entry(name, found.size, found.tag), 0, found.size))

    def list(self, area: str) -> tuple[Entry, ...]:
        if area != "files":
            return ObjectStore(self.journal / area).list(every=True)
        mine = {entry.name for area in ("kept", "staged") for entry in self.list(area)}
        mine |= set(json.loads(self.get("replaced") or b"[]"))
        # A file that somebody else put there is not the output's.
        return tuple(entry for entry in self.files.list(every=True) if entry.name in mine)

    def drop(self, name: str) -> None:
        key = self._key(name)
        self._client.patient(self._client.what("removing", key), lambda: self._client.delete([key]))

    def scratch(self, name: str) -> Path:
        folder = scratch_folder(current().scratch, self._name)
        make_own(folder)
        return folder / name

    def keep(self, part: Path, name: str, large: Sequence[Range] = ()) -> Entry:
        self._claim.check()
        self._note(name)
        size = size_of(part)
        made = upload(self._client, self._key(name), file_blocks(part), size)
        with io_errors("removing", part):
            part.unlink()
        return Entry(name, size, made.tag)

    def shared(self, name: str, size: int | None = None) -> Path | None:
        return None

    def assemble(
        self, name: str, pieces: Sequence[tuple[int, str]], around: Sequence[tuple[int, bytes]], size: int
    ) -> None:
        self._claim.check()
        self._note(name)
        there = {piece: found_at(self._client, self._key(piece)) for _, piece in pieces}
        whole = None if all(there.values()) else found_at(self._client, self._key(name))
        if whole is not None and not any(there.values()):
            return  # an interrupted run came this far
        starts = sorted([start for start, _ in pieces] + [start for start, data in around if data])
        stops = dict(zip(starts, [*starts[1:], size], strict=True))
        sources: list[tuple[int, Source]] = [(start, data) for start, data in around if data]
        for start, piece in pieces:
            found: Source | None = there[piece]
            if found is None and whole is not None and whole.size == size:
                # An interrupted run has made the file, and was about to remove the pieces.
                found = Copied(whole, start, stops[start])
            if found is None:
                raise StorageError(f"{self.journal / piece}: it is gone; run the same command again")
            sources.append((start, found))
        sources.sort(key=lambda each: each[0])
        assemble(self._client, self._key(name), [source for _, source in sources], size)
        for _, piece in pieces:
            self.drop(piece)

    def join(self, name: str, chunks: Iterator[bytes], size: int, large: Sequence[Range] = ()) -> Entry:
        self._claim.check()
        self._note(name)
        return Entry(name, size, upload(self._client, self._key(name), chunks, size).tag)

    def stage(self, name: str, data: bytes) -> None:
        self.put(f"staged/{name}", data)
        order = json.loads(self.get("order") or b"[]")
        self.put("order", json.dumps([*(each for each in order if each != name), name]).encode())

    def holds(self, written: Entry, digest: str, start: int | None = None) -> bool:
        found = found_at(self._client, self._key(written.name))
        if found is None or start is None:
            return found is not None and (found.size, found.tag) == (written.size, written.tag)
        # A piece of a file that was assembled: the file's tag says nothing of it.
        name = written.name.partition("/")[2]
        entry = Entry(name, found.size, found.tag)
        is_whole = found.size >= start + written.size
        return is_whole and hash_stored(ObjectStore(self.address), entry, start, written.size) == digest

    def publish(self, *, overwrite: bool) -> None:
        for name in json.loads(self.get("order") or b"[]"):
            data = self.get(f"staged/{name}")
            if data is None:
                raise BadSpec(f"{self.journal}: {name} is gone from it; run the same command again")
            self._claim.check()
            key = self._key(f"files/{name}")
            try:
                self._client.patient(
                    self._client.what("publishing", key),
                    lambda key=key, data=data: self._client.put(key, data, None if overwrite else "create"),  # type: ignore[misc]
                )
            # It exists: from an interrupted attempt of this job, or from another job.
            except Unmet:
                there = ObjectStore(self.address).find(name)
                if there is None or bytes(ObjectStore(self.address).read(there, 0, there.size)) != data:
                    raise BadSpec(f"{self.address} came into being while the job ran") from None

    def forget(self) -> None:
        # The claim goes last, by who holds it.
        remove_journal(self.journal, lambda name: name != "claim")
        for each in uploads_below(self.address):
            abort(self._client, each)
        shutil.rmtree(scratch_folder(current().scratch, self._name), ignore_errors=True)

    def forget_empty(self) -> None:
        """A prefix without objects is nothing."""


# --- scratch


@cache
def scratch_folder(above: str | None, key: str) -> Path:
    """Return this process's folder for files on their way, which is removed when it ends."""
    folder = Path(above or tempfile.gettempdir()) / f"{SCRATCH}-{key}-{os.getpid()}"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _remove_stale_scratch() -> None:
    """Remove the folders of processes that were killed."""
    above = Path(current().scratch or tempfile.gettempdir())
    for folder in above.glob(f"{SCRATCH}-*-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdigit() and not Path(f"/proc/{number}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)
