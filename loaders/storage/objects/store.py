"""The objects below a prefix of a bucket, or the files below a URL, as a store.

Reads name the version that was found (If-Match), and the answer's version, range and length are checked: a store's word
is not trusted. A body that is cut goes on where it ended.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from loaders.errors import BadCheckpoint, StorageError
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT, Entry, Range
from loaders.storage.folder import A_FILE, SKIPPED
from loaders.storage.objects.answers import Denied, Missing, NoRanges, Unmet
from loaders.storage.objects.client import UNKNOWN, Found, ObjectClient, client_of
from loaders.storage.objects.names import found_by_name
from loaders.storage.objects.whole import WholeFiles
from loaders.storage.patience import Passing

log = logging.getLogger("weightmill")
T = TypeVar("T")
HIDDEN = ".weightmill/"  # the prefix of journals, below their outputs' addresses
# A body that breaks after so many bytes does not count as a failure: the request for the rest is made at once, and has
# the whole patience for itself.
PROGRESS = 1 << 20
PAGES = ("text/html", "application/xhtml")  # what servers answer instead of 404, when they answer every path


class ObjectStore:
    """A `Store` of objects below a prefix. A file's tag is its ETag, or its time of change where there is none."""

    is_local = False

    def __init__(self, address: Address) -> None:
        self.address = address
        client_of(address)  # an address that is not valid is refused here

    @property
    def _client(self) -> ObjectClient:
        return client_of(self.address)[0]

    def _key(self, name: str = "") -> str:
        return "/".join(part for part in (client_of(self.address)[1], name) if part)

    def absence(self) -> str | None:
        names = [entry.name for entry in self._all()]
        if names:
            is_under_way = any(name.startswith(HIDDEN) for name in names) and OUR_REPORT not in names
            return "an output under way" if is_under_way else None
        is_file = bool(self._key()) and self._found(self._key()) is not None
        return A_FILE if is_file else self._nothing()

    def _nothing(self) -> str:
        if self._client.service.has_lists:
            return "nothing there"
        return "none of the files that a model has (config.json, an index, weights under their usual names)"

    def is_taken(self) -> bool:
        return self.absence() is None

    def is_link(self) -> bool:
        return False

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        return tuple(
            entry
            for entry in self._all()
            if HIDDEN not in entry.name
            and (deep or "/" not in entry.name)
            and (every or not set(PurePosixPath(entry.name).parts) & {*SKIPPED})
        )

    def _all(self) -> tuple[Entry, ...]:
        """List all files, those of journals included; where nothing can be listed, those that are found by name."""
        client, prefix = self._client, self._key()
        if not client.service.has_lists:
            return self._by_name
        what = f"listing {self.address}"
        try:
            found = client.patient(what, lambda: _looked(client.list, prefix))
        # S3 says of a bucket that does not exist what it says of an object.
        except Missing:
            raise StorageError(f"{what}: there is no such bucket; check its name, and the endpoint") from None
        except Forbidden as refused:
            return self._unlisted(refused.denial)
        top = f"{prefix}/" if prefix else ""
        entries = [Entry(each.key.removeprefix(top), each.size, each.tag) for each in found if each.key != prefix]
        # Consoles make an empty object for a folder, whose name obstore gives without its slash.
        folders = {str(above) for entry in entries for above in PurePosixPath(entry.name).parents}
        return tuple(entry for entry in entries if entry.size or entry.name not in folders)

    def _unlisted(self, denial: Denied) -> tuple[Entry, ...]:
        """Find files by name in a bucket that may be read and not listed."""
        entries = self._by_name
        if not entries:
            raise self._client.denied(f"listing {self.address}", denial) from None
        say_once(
            f"{self.address} may not be listed: its files are those with the usual names, and those that these name"
        )
        return entries

    @cached_property
    def _by_name(self) -> tuple[Entry, ...]:
        """The files that are found by name, for which each store looks once: that is a request for every name."""
        entries = found_by_name(self.find, self.read)
        if any(entry.tag == UNKNOWN for entry in entries):
            say_once(
                f"{self.address}: the server gives no versions of files: a file that changes under a job is noticed"
                " by its size alone"
            )
        return entries

    def find(self, name: str) -> Entry | None:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise BadCheckpoint(f"{name!r} leads out of {self.address}; do not trust what names it")
        found = self._found(self._key(name))
        return None if found is None else Entry(name, found.size, found.tag)

    def _found(self, key: str) -> Found | None:
        client = self._client
        what = client.what("looking at", key)
        look = client.head if client.service.has_lists else self._probed
        try:
            return client.patient(what, lambda: _looked(look, key))
        except Missing:
            return None
        except Forbidden as refused:
            # S3 says the same of an object that does not exist, to somebody who may not list the bucket.
            if self._may_list():
                raise client.denied(what, refused.denial) from None
            return None

    def _may_list(self) -> bool:
        client, prefix = self._client, self._key()
        if not client.service.has_lists:
            return True
        try:
            client.patient(f"listing {self.address}", lambda: _looked(client.list, f"{prefix}/{HIDDEN}"))
        except Forbidden:
            return False
        return True

    def _probed(self, key: str) -> Found:
        """Look a file up by its first byte: not every server answers HEAD, and this tells whether it sends ranges."""
        client, has_ranges = self._client, True
        try:
            found, _, headers = client.get(key, 0, 1)
        except NoRanges:
            (found, _, headers), has_ranges = client.get_whole(key), False
        # A range of an empty file is refused.
        except StorageError:
            found, headers = client.head(key), {}
            if found.size:
                raise
        if str(headers.get("Content-Type", "")).startswith(PAGES) and not key.endswith((".html", ".htm")):
            raise Missing(key)
        if not has_ranges:
            WholeFiles(client).cache(key)
        return found

    def check_inside(self, name: str, *, may_leave: bool = False) -> None:
        """Do nothing: there are no links."""

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        if stop > entry.size:
            raise BadCheckpoint(f"{entry.name}: it ends at byte {entry.size}, expected {stop}; fetch it again")
        return read_object(self._client, self._key(entry.name), entry, start, stop)

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        limit = self._client.traffic.limit
        if len(ranges) < 2 or limit < 2:
            yield from (self.read(entry, start, stop) for start, stop in ranges)
            return
        ahead: deque[Future[memoryview]] = deque()
        with ThreadPoolExecutor(min(limit, len(ranges)), thread_name_prefix="range") as pool:
            try:
                for start, stop in ranges:
                    ahead.append(pool.submit(self.read, entry, start, stop))
                    # What was fetched and not taken yet is in memory.
                    if len(ahead) >= limit:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def check_unchanged(self, entry: Entry) -> None:
        """Do nothing: every read is for a version, and fails for another."""

    def local_path(self, name: str) -> Path | None:
        return None


def read_object(client: ObjectClient, key: str, entry: Entry, start: int, stop: int) -> memoryview:
    """Read bytes [start, stop) of the version of an object that an entry names; errors as `Store.read`."""
    body = _Body(client, key, entry, start, stop)
    while not body.is_complete:
        try:
            client.patient(client.what("reading", key), body.go_on)
        except (Missing, Unmet) as answer:
            raise _gone(client, key, entry, answer) from None
        except NoRanges:
            return WholeFiles(client).read(key, entry, start, stop)
    return body.data


def _gone(client: ObjectClient, key: str, entry: Entry, answer: Missing | Unmet) -> BadCheckpoint | StorageError:
    # Not every store tells a version that is gone from another one.
    if isinstance(answer, Missing) or found_at(client, key) is None:
        return StorageError(f"{client.what('reading', key)}: it is not there (any more)")
    return BadCheckpoint(f"{entry.name}: it changed while it was read; load it again when nobody writes to it")


def found_at(client: ObjectClient, key: str) -> Found | None:
    """Look an object up; None if it does not exist.

    Raises:
        StorageError: it cannot be looked up.
    """
    try:
        return client.patient(client.what("looking at", key), lambda: client.head(key))
    except Missing:
        return None


class Forbidden(Exception):
    """The store knows who asks, and refuses it (403)."""

    def __init__(self, denial: Denied) -> None:
        super().__init__(str(denial))
        self.denial = denial


def _looked(look: Callable[[str], T], key: str) -> T:
    """Look up a key, or list a prefix. Raises as `ObjectClient`, but Forbidden for a refusal that says who asks."""
    try:
        return look(key)
    except Denied as denial:
        if denial.status != 403:
            raise
        raise Forbidden(denial) from None


@cache
def say_once(text: str) -> None:
    """Log a remark on a store, once in a process."""
    log.warning("%s", text)


class _Body:
    """A range of a file on its way: what has come, and the requests for the rest."""

    def __init__(self, client: ObjectClient, key: str, entry: Entry, start: int, stop: int) -> None:
        self.key = key
        self.data = memoryview(bytearray(stop - start))
        self._client = client
        self._entry = entry
        self._start = start
        self._done = 0

    @property
    def is_complete(self) -> bool:
        return self._done == len(self.data)

    def go_on(self) -> None:
        """Ask for the bytes that are missing, and take what comes.

        Raises:
            Passing: the body ended early, and brought little.
            Unmet: the object is another version by now.
            StorageError: the body is longer than asked for.
        """
        before = self._done
        try:
            at = self._start + self._done
            found, body, _ = self._client.get(self.key, at, self._start + len(self.data), self._entry.tag)
            if (found.size, found.tag) != (self._entry.size, self._entry.tag):
                raise Unmet(self.key)
            for piece in body:
                self._take(piece)
            if not self.is_complete:
                raise Passing(f"the body ended {len(self.data) - self._done} bytes early")
        except Passing as failure:
            if self._done - before < PROGRESS:
                raise
            if failure.is_busy:
                self._client.traffic.busy()
        finally:
            self._client.traffic.moved(fetched=self._done - before)

    def _take(self, piece: memoryview) -> None:
        if len(piece) > len(self.data) - self._done:
            raise StorageError(
                f"{self._entry.name}: the store sent more than the {len(self.data)} bytes that it was asked for;"
                " do not trust it"
            )
        self.data[self._done : self._done + len(piece)] = piece
        self._done += len(piece)


def folders_at(address: Address, most: int) -> list[str]:
    """List the names directly below an address that have objects below them, at most so many.

    Raises:
        StorageError: nothing can be listed there.
    """
    client, prefix = client_of(address)
    what = f"listing {address}"
    try:
        found = client.patient(what, lambda: _looked(client.folders, prefix))
    except Missing:
        raise StorageError(f"{what}: there is no such bucket; check its name, and the endpoint") from None
    except Forbidden as refused:
        raise client.denied(what, refused.denial) from None
    return [name for each in found if not (name := each.rstrip("/").rpartition("/")[2]).startswith(".")][:most]
