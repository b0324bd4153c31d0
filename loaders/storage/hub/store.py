"""A repository of the Hugging Face Hub as a store: hf://OWNER/NAME[@REVISION][/FOLDER].

A branch or tag is resolved to its commit when the store is opened, and the store's address names that commit, so that
what reads on by the address reads the same files, whatever happens to the branch. Files that huggingface_hub's cache
has are read there; if it has all of them, the store is local. What it has is read without a network, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from loaders.errors import BadCheckpoint, BadSpec, StorageError
from loaders.storage.address import Address
from loaders.storage.base import Entry, Range
from loaders.storage.folder import Folder
from loaders.storage.hub.cache import cached_commit, cached_file, cached_tree, snapshot
from loaders.storage.hub.client import COMMIT, Closed, NotThere, about, hub, is_offline
from loaders.storage.hub.files import HubFile, files_of

SCHEME = "hf"
REPO = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
# Git's own files, which say how the repository is stored and are no part of what is in it.
HIDDEN = (".gitattributes", ".gitignore")


@dataclass(frozen=True, slots=True)
class Place:
    """What an address names: a repository, its revision (a branch, a tag, a commit; None: `main`), a path in it."""

    repo: str
    revision: str | None
    path: str = ""

    @staticmethod
    def of(address: Address) -> Place:
        """Take an address apart.

        Raises:
            BadSpec: it is not of that form.
        """
        parts = urlsplit(address.text)
        name, _, path = parts.path.strip("/").partition("/")
        name, _, revision = name.partition("@")
        repo = f"{parts.netloc}/{name}"
        if not REPO.fullmatch(repo) or ".." in repo or "--" in repo:
            raise BadSpec(f"{address}: expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION, or one with /PATH after it")
        if any(part in ("", ".", "..") for part in path.split("/")[path == "" :]):
            raise BadSpec(f"{address}: {path!r} is no path in a repository")
        return Place(repo, unquote(revision) or None, unquote(path))

    @property
    def address(self) -> Address:
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return Address(f"{SCHEME}://{self.repo}{revision}{'/' if self.path else ''}{quote(self.path)}")

    def at(self, revision: str | None) -> Place:
        return Place(self.repo, revision, self.path)


class HubStore:
    """A `Store` of the files of a commit, or of those below a folder. A file's tag is its hash."""

    def __init__(self, address: Address) -> None:
        self._given = Place.of(address)
        self._hub = hub()

    @cached_property
    def _is_cached(self) -> bool:
        """Whether the cache alone is read: HF_HUB_OFFLINE, or it has the revision and the Hub is out of reach."""
        repo, revision, where = self._given.repo, self._given.revision, self._given.address
        if is_offline() or cached_commit(repo, revision or "main") is None:
            return is_offline()
        return self._hub.is_out_of_reach(str(where), about(repo, revision))

    @cached_property
    def _commit(self) -> str:
        """The commit that the address names.

        Raises:
            NotThere: there is none, or not for this account.
        """
        repo, revision = self._given.repo, self._given.revision
        if revision is not None and COMMIT.fullmatch(revision):
            return revision
        if not self._is_cached:
            return str(self._hub.info(repo, revision, str(self._given.address))["sha"])
        found = cached_commit(repo, revision or "main")
        if found is None:
            raise NotThere(
                str(self._given.address),
                "nothing of it in the Hub's cache, and HF_HUB_OFFLINE is set: fetch it while there is a network"
                f" (hf download {repo}), or unset HF_HUB_OFFLINE",
            )
        return found

    @cached_property
    def _tree(self) -> Mapping[str, HubFile]:
        """All files of the commit by their paths."""
        read = cached_tree if self._is_cached else files_of(self._hub).tree
        return read(self._given.repo, self._commit)

    @property
    def _prefix(self) -> str:
        """The folder that names begin at, with a slash behind it; empty at the top."""
        return f"{self._given.path}/" if self._given.path else ""

    @cached_property
    def _files(self) -> Mapping[str, HubFile]:
        """The files of this store by their names."""
        return {
            path.removeprefix(self._prefix): file
            for path, file in sorted(self._tree.items())
            if path.startswith(self._prefix) and path.rpartition("/")[2] not in HIDDEN
        }

    @property
    def address(self) -> Address:
        try:
            return self._given.at(self._commit).address
        # Its message names the address as it was given.
        except NotThere:
            return self._given.address

    @cached_property
    def is_local(self) -> bool:
        try:
            return bool(self._files) and all(cached_file(file) is not None for file in self._files.values())
        except NotThere:
            return False

    def absence(self) -> str | None:
        try:
            if self._files:
                return None
        except NotThere as error:
            return error.absence
        if self._given.path in self._tree:
            return "a file; give the folder it lies in"
        return f"no file or folder {self._given.path!r} in it" if self._given.path else "nothing there"

    def is_taken(self) -> bool:
        try:
            return bool(self._files)
        except Closed:
            return True
        except NotThere:
            return False

    def is_link(self) -> bool:
        return False

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        try:
            return tuple(_entry(name, file) for name, file in self._files.items() if deep or "/" not in name)
        except NotThere:
            return ()

    def find(self, name: str) -> Entry | None:
        if name.startswith("/") or ".." in name.split("/"):
            raise BadCheckpoint(f"{name!r} leads out of {self._given.address}; do not trust what names it")
        try:
            file = self._files.get(name)
        except NotThere:
            return None
        return None if file is None else _entry(name, file)

    def check_inside(self, name: str, *, may_leave: bool = False) -> None:
        """Do nothing: a repository has no links that are followed."""

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        if stop > entry.size:
            raise BadCheckpoint(f"{entry.name}: it ends at byte {entry.size}, expected {stop}; fetch it again")
        if start == stop:
            return memoryview(b"")
        file = HubFile(self._given.repo, self._commit, self._prefix + entry.name, entry.size, entry.tag)
        if (path := cached_file(file)) is not None:
            folder = Folder(path.parent)
            return folder.read(folder.entry_of(path.name), start, stop)
        if self._is_cached:
            why = "HF_HUB_OFFLINE is set: unset it" if is_offline() else "the Hub is out of reach: check the network"
            raise StorageError(f"{file.shown}: it is not in the Hub's cache, and {why}")
        return files_of(self._hub).read(file, start, stop)

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        return (self.read(entry, start, stop) for start, stop in ranges)

    def check_unchanged(self, entry: Entry) -> None:
        """Do nothing: a commit does not change, and neither do the blobs of the cache."""

    def local_path(self, name: str) -> Path | None:
        return snapshot(self._given.repo, self._commit) / self._prefix / name if self.is_local else None


def _entry(name: str, file: HubFile) -> Entry:
    return Entry(name, file.size, file.tag)
