"""An unpublished output on its way to the Hub: hf://OWNER/NAME[@BRANCH].

The Hub knows uploads, which nobody sees, and commits, which are atomic. So weight files are uploaded when they are
finished and then leave this machine, and publishing is one commit of all files. The Hub has no place for a journal: it
is a folder or a prefix of an object store (`StoreSettings.journal`; by default a folder of this user's cache), made by
the destination that such places have. Pieces of a file that several units write stay there, too, since the Hub joins
no parts: the file is joined in the scratch folder and uploaded whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, urlsplit

from loaders.errors import BadSpec, StorageError, io_errors
from loaders.storage import destination_at, kind_of
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT, Abandoned, Entry, Range, Store
from loaders.storage.hub.branch import SAMPLE, HubBranch
from loaders.storage.hub.client import hub
from loaders.storage.hub.files import files_of
from loaders.storage.hub.finished import FinishedFiles
from loaders.storage.hub.store import HIDDEN, HubStore, Place
from loaders.storage.ownership import make_own
from loaders.storage.settings import current
from loaders.storage.user_cache import default_folder

PARENT = "parent.json"  # the branch's commit when the job began


def journals() -> Address:
    """Return where the journals of outputs on the Hub are."""
    return Address.of(current().journal or default_folder() / "journals")


class HubDestination:
    """A `Destination` on a branch of a repository."""

    is_local = False
    assembles = False  # the Hub joins nothing by itself

    def __init__(self, address: Address, key: str) -> None:
        place = Place.of(address)
        if place.path:
            raise BadSpec(f"{address}: expected hf://OWNER/NAME: an output is a repository of its own")
        self.address = address
        self._settings = current()
        self._branch = HubBranch(place)
        self._inner = destination_at(journals() / _journal_name(place), key)
        self._scratch = Path(self._settings.scratch or tempfile.gettempdir()) / f"weightmill-hub-{key[:12]}"
        self._finished = FinishedFiles(address, self._inner)

    @property
    def journal(self) -> Address:
        return self._inner.journal

    @property
    def files(self) -> Store:
        return self._finished

    @property
    def pieces(self) -> Store:
        return self._inner.pieces

    def prepare(self, *, overwrite: bool) -> None:
        self._inner.prepare(overwrite=False)
        # Only the driver that holds the claim comes here, so what is in it is from attempts that were killed.
        with io_errors("removing", self._scratch), suppress(FileNotFoundError):
            shutil.rmtree(self._scratch)
        head = self._branch.prepare(is_private=self._settings.private)
        self._inner.put(PARENT, json.dumps({"commit": head}).encode())

    def is_there(self) -> bool:
        return self._inner.is_there()

    def claim(self) -> AbstractContextManager[str | None]:
        return self._inner.claim()

    def put(self, name: str, data: bytes) -> None:
        area, _, rest = name.partition("/")
        if area == "files":
            self._finished.add(rest, data)
        else:
            self._inner.put(name, data)

    def get(self, name: str) -> bytes | None:
        return self._inner.get(name)

    def list(self, area: str) -> tuple[Entry, ...]:
        return self._finished.list() if area == "files" else self._inner.list(area)

    def drop(self, name: str) -> None:
        area, _, rest = name.partition("/")
        if area == "files":
            self._finished.drop(rest)
        else:
            self._inner.drop(name)

    def scratch(self, name: str) -> Path:
        make_own(self._scratch)
        return self._scratch / name

    def keep(self, part: Path, name: str, large: Sequence[Range] = ()) -> Entry:
        area, _, rest = name.partition("/")
        if area != "files":
            return self._keep_piece(part, name)
        with io_errors("reading", part), part.open("rb") as file:
            size, sample = part.stat().st_size, file.read(SAMPLE)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest() if large else ""
        if large and self._branch.wants_lfs({rest: (size, sample)})[rest]:
            self._branch.upload(rest, part, sha256)
            entry = self._finished.add_uploaded(rest, part, sha256, large)
        else:
            entry = self._finished.add(rest, part.read_bytes())
        part.unlink()
        return Entry(name, entry.size, entry.tag)

    def _keep_piece(self, part: Path, name: str) -> Entry:
        """Move a piece to the journal, which may lie on another disk than the scratch folder."""
        place = self._inner.scratch(part.name)
        with io_errors("moving", part):
            shutil.move(part, place)
        return self._inner.keep(place, name)

    def shared(self, name: str, size: int | None = None) -> Path | None:
        return None

    def assemble(
        self, name: str, pieces: Sequence[tuple[int, str]], around: Sequence[tuple[int, bytes]], size: int
    ) -> NoReturn:
        raise NotImplementedError("nothing is written in place here")

    def join(self, name: str, chunks: Iterator[bytes], size: int, large: Sequence[Range] = ()) -> Entry:
        part = self.scratch(f"joined-{Path(name).name}")
        with io_errors("writing", part), part.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        return self.keep(part, name, large)

    def stage(self, name: str, data: bytes) -> None:
        self._finished.add(name, data)

    def holds(self, written: Entry, digest: str, start: int | None = None) -> bool:
        area, _, rest = written.name.partition("/")
        if area != "files":
            return self._inner.holds(written, digest, start)
        found = self._finished.get(rest)
        if found is None or (found.size, found.sha256) != (written.size, written.tag):
            return False
        return not found.is_uploaded or found.sha256 not in self._lost

    @cached_property
    def _lost(self) -> set[str]:
        """The sha256 of uploaded files that the Hub has no longer, which may collect what no commit names."""
        uploaded = {file.sha256: file.size for file in self._finished.all().values() if file.is_uploaded}
        return self._branch.lacks(uploaded) if uploaded else set()

    def publish(self, *, overwrite: bool) -> None:
        files = self._finished.all()
        here = {name: file for name, file in files.items() if not file.is_uploaded}
        wants_lfs = self._branch.wants_lfs(
            {name: (file.size, self._finished.data(name)) for name, file in here.items()}
        )
        for name, file in here.items():
            if wants_lfs[name]:
                self._branch.upload(name, self._finished.data(name), file.sha256)
        parent = json.loads(self._inner.get(PARENT) or b"{}").get("commit") or self._branch.create()
        there = files_of(hub()).tree(self._branch.repo, parent)
        is_committed = self._branch.commit(
            parent,
            self._settings.commit_message or "an output of weightmill",
            inline={name: self._finished.data(name) for name in here if not wants_lfs[name]},
            objects={name: (file.sha256, file.size) for name, file in files.items() if wants_lfs.get(name, True)},
            deleted=[path for path in there if path not in files and path.rpartition("/")[2] not in HIDDEN],
        )
        # The answer to an earlier attempt may have been lost.
        if not is_committed and not self._is_ours():
            if not overwrite and HubStore(self.address).is_taken():
                raise BadSpec(f"{self.address} came into being while the job ran")
            raise StorageError(
                f"{self.address}: somebody else committed to it while the job ran; run the same command again: what was"
                " uploaded is not uploaded again"
            )

    def _is_ours(self) -> bool:
        """Whether the branch has this very output."""
        found, report = HubStore(self.address).find(OUR_REPORT), self._finished.get(OUR_REPORT)
        if found is None or report is None or found.size != report.size:
            return False
        return bytes(HubStore(self.address).read(found, 0, found.size)) == self._finished.data(OUR_REPORT)

    def forget(self) -> None:
        self._inner.forget()
        # It does not exist, or holds parts of another process.
        with suppress(OSError):
            self._scratch.rmdir()

    def forget_empty(self) -> None:
        self._inner.forget_empty()


def _journal_name(place: Place) -> str:
    branch = quote(place.revision or "main", safe="")
    return place.repo.replace("/", "--") + ("" if branch == "main" else f"@{branch}")


def abandoned_at(address: Address, name: str | None = None) -> tuple[Abandoned, ...]:
    """List the journals of interrupted jobs: of an output by its address, or of an owner's, hf://OWNER, or of all."""
    where, owner = journals(), urlsplit(address.text).netloc
    if name is not None:
        return kind_of(where).abandoned(where, _journal_name(Place.of(address)))
    return tuple(
        left
        for left in kind_of(where).abandoned(where, None)
        if re.search(rf"/\.?{re.escape(owner)}{'--' if owner else ''}", left.address.text.removeprefix(where.text))
    )
