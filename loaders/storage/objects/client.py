"""Requests for objects: one client for each bucket of a process, whose credentials are renewed when they end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from loaders.errors import BadSpec, StorageError
from loaders.storage.address import Address
from loaders.storage.objects.answers import Denied, Elsewhere, Missing, Unmet, answers
from loaders.storage.objects.parts import Parts, has_parts, parts_of
from loaders.storage.objects.services import VARIABLES, libraries, place_of, service_of
from loaders.storage.patience import patiently
from loaders.storage.settings import StoreSettings, current
from loaders.storage.traffic import Traffic, traffic

if TYPE_CHECKING:
    from obstore import GetOptions

RENEW_S = 5.0  # between two attempts to renew credentials: many requests may fail by the same ones
# Bytes of a body that are handed on at once: when a connection is cut, at most so many that came are lost.
CHUNK = 256 << 10
T = TypeVar("T")
Version = Mapping[str, str]  # e_tag, version, or both


@dataclass(frozen=True, slots=True)
class Found:
    """One version of an object: key, size in bytes, tag, time of change, and its name in conditional writes."""

    key: str
    size: int
    tag: str
    changed: datetime
    version: Version


class ObjectClient:
    """A client of one bucket. All methods raise as `answers`, unless they say otherwise."""

    def __init__(self, scheme: str, bucket: str, settings: StoreSettings) -> None:
        self.service = service_of(scheme, bucket, settings)
        self.settings = settings
        self._place = (scheme, bucket)
        shown = str(Address(bucket if "://" in bucket else f"{scheme}://{bucket}"))
        self._shown = shown.partition("?")[0].rstrip("/")
        self._lock = threading.Lock()
        self._opened_at = 0.0
        self._parts_at = 0.0
        self._store: Any = None
        self._parts: Parts | None = None

    @property
    def traffic(self) -> Traffic:
        return traffic(self.service.host)

    def list(self, prefix: str) -> list[Found]:
        """List all objects whose keys begin with PREFIX/, sorted by key."""
        import obstore

        def call(store: Any) -> list[Found]:
            pages = obstore.list(store, prefix or None)
            return sorted((_found(meta) for page in pages for meta in page), key=lambda each: each.key)

        return self._ask(f"listing {self._shown}/{prefix}", call)

    def folders(self, prefix: str) -> Sequence[str]:
        """List the prefixes directly below PREFIX/, up to the next slash, sorted."""
        import obstore

        def call(store: Any) -> Sequence[str]:
            return sorted(obstore.list_with_delimiter(store, prefix or None)["common_prefixes"])

        return self._ask(f"listing {self._shown}/{prefix}", call)

    def head(self, key: str) -> Found:
        import obstore

        return _found(self._ask(self.what("looking at", key), lambda store: obstore.head(store, key)), key)

    def get(self, key: str, start: int, stop: int, tag: str | None = None) -> tuple[Found, Iterator[memoryview], Any]:
        """Ask for bytes [start, stop) of an object, of the version with a tag: what was found, its bytes, its headers.

        The bytes may end early, or be more than asked for.
        """
        import obstore

        options: GetOptions = {"range": (start, stop)}
        # Servers compare strongly, and a weak tag (W/...) is never equal then. The answer's tag is compared anyway.
        if tag is not None and tag.startswith('"'):
            options["if_match"] = tag
        got = self._ask(self.what("reading", key), lambda store: obstore.get(store, key, options=options))
        return _found(got.meta, key), self._body(key, got), got.attributes

    def get_whole(self, key: str) -> tuple[Found, Iterator[memoryview], Any]:
        """Ask for a whole object, as `get` does for a range."""
        import obstore

        got = self._ask(self.what("reading", key), lambda store: obstore.get(store, key))
        return _found(got.meta, key), self._body(key, got), got.attributes

    def _body(self, key: str, got: Any) -> Iterator[memoryview]:
        with answers(self.what("reading", key), self.settings.timeout_s):
            for piece in got.stream(min_chunk_size=CHUNK):
                yield memoryview(piece)

    def put(self, key: str, data: bytes, condition: Version | Literal["create"] | None = None) -> Version:
        """Write a small object in one request; returns its version, whose tag `tag_of` gives.

        `condition` is "create" for an object that must not exist, or the version that it must have.
        """
        import obstore

        mode: Any = "overwrite" if condition is None else condition
        what = self.what("writing", key)
        try:
            made = self._ask(what, lambda store: obstore.put(store, key, data, mode=mode, use_multipart=False))
        except Missing:
            # Azure and Google say so of what is written on a condition, when it is gone.
            if condition not in (None, "create"):
                raise Unmet(what) from None
            raise StorageError(f"{what}: there is no such bucket; check its name, and the endpoint") from None
        self.traffic.moved(uploaded=len(data))
        return _version(made)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects that exist, in this order."""
        import obstore

        for key in keys:
            try:
                self._ask(self.what("removing", key), lambda store, key=key: obstore.delete(store, key))  # type: ignore[misc]
            except Missing:
                continue

    def put_stream(self, key: str, blocks: Iterator[bytes], part_size: int, at_once: int) -> None:
        """Write a large object in parts by obstore, which alone can try a part again: its own retries are on."""
        import obstore

        what = self.what("uploading", key)
        with self.traffic.request(), answers(what, self.settings.timeout_s):
            store = self.service.open(patience_s=self.settings.patience_s)
            obstore.put(store, key, blocks, use_multipart=True, chunk_size=part_size, max_concurrency=at_once)

    @property
    def has_parts(self) -> bool:
        """Whether `in_parts` can be used here."""
        return has_parts(self._place[0], self._place[1], self.settings)

    def in_parts(self, what: str, call: Callable[[Parts], T], patience_s: float | None = None) -> T:
        """Make a request for an upload in parts, as `patient` does, with credentials that are renewed when they end.

        Raises:
            Missing: there is no such upload (any more).
            StorageError: as `patient`.
        """

        def once() -> T:
            used = self._parts_opened()
            try:
                return call(used)
            except Denied as denial:
                if not denial.may_be_renewed or time.monotonic() - self._parts_at < RENEW_S:
                    raise
                self._parts = None
                return call(self._parts_opened())

        return self.patient(what, once, patience_s)

    def _parts_opened(self) -> Parts:
        with self._lock:
            if self._parts is None:
                with libraries(self._place[0]):
                    self._parts, self._parts_at = parts_of(*self._place, self.settings), time.monotonic()
            return self._parts

    def what(self, action: str, key: str) -> str:
        return f"{action} {self._shown}/{key}"

    def denied(self, what: str, denial: Denied) -> StorageError:
        """Return the error for a request that was refused."""
        by = "who you are is not known" if denial.status == 401 else "you may not do this"
        word = f" {denial.code}" if denial.code else ""
        return StorageError(f"{what}: {by} ({denial.status}{word}); {self.service.advice}")

    def patient(self, what: str, call: Callable[[], T], patience_s: float | None = None) -> T:
        """Call until it succeeds or the patience is used up; concurrency steps back when the store is asked too much.

        Raises:
            StorageError: as `patiently`, or the request is refused.
        """

        def once() -> T:
            with self.traffic.request():
                return call()

        try:
            return patiently(what, once, self.traffic, patience_s=patience_s, if_unreached=self._if_unreached())
        except Denied as denial:
            raise self.denied(what, denial) from None

    def _if_unreached(self) -> str:
        host = self.service.host.rpartition("@")[2]  # without a password
        return f"check the network, and whether {host} is the host that you mean"

    def _ask(self, what: str, call: Callable[[Any], T]) -> T:
        store = self._opened()
        try:
            with answers(what, self.settings.timeout_s):
                return call(store)
        except Denied as denial:
            if not (denial.may_be_renewed and self._renewed(store)):
                raise
        except Elsewhere:
            raise StorageError(
                f"{what}: the bucket is in another region; give store.region=... or AWS_REGION"
            ) from None
        with answers(what, self.settings.timeout_s):
            return call(self._opened())

    def _opened(self) -> Any:
        with self._lock:
            if self._store is None:
                self._store, self._opened_at = self._open(), time.monotonic()
            return self._store

    def _renewed(self, failed: Any) -> bool:
        """Open the client anew, unless that was just done; whether the request is worth another attempt."""
        with self._lock:
            if self._store is not failed:
                return True
            if time.monotonic() - self._opened_at < RENEW_S:
                return False
            self._store, self._opened_at = self._open(), time.monotonic()
            return True

    def _open(self) -> Any:
        from obstore.exceptions import BaseError

        try:
            return self.service.open()
        # Its text may quote a variable of the environment.
        except (BaseError, ValueError, TypeError, OSError) as error:
            raise BadSpec(
                f"{self._shown}: its settings or credentials are not valid ({type(error).__name__});"
                f" {self.service.advice}"
            ) from None


def client_of(address: Address) -> tuple[ObjectClient, str]:
    """Return the client of an address's bucket, by this process's settings and environment, and the address's key.

    Raises:
        BadSpec: the address is not valid, or the service cannot be reached with these settings.
    """
    bucket, key = place_of(address)
    environment = tuple(sorted((n, v) for n, v in os.environ.items() if n.startswith(VARIABLES)))
    return _client(address.scheme, bucket, current(), environment), key


@cache
def _client(
    scheme: str, bucket: str, settings: StoreSettings, environment: tuple[tuple[str, str], ...]
) -> ObjectClient:
    return ObjectClient(scheme, bucket, settings)


def tag_of(meta: Any) -> str:
    """Return the tag of a version: its ETag, else its time of change, else UNKNOWN: its size alone tells it apart."""
    tag = meta.get("e_tag")
    if tag:
        # Azure's lists have the tags without the quotes of its other answers.
        return tag if tag.endswith('"') else f'"{tag}"'
    changed = meta.get("last_modified")
    return changed.isoformat() if changed is not None and changed.timestamp() > 0 else UNKNOWN


UNKNOWN = "unknown"  # the tag where a server gives none


def _found(meta: Any, key: str | None = None) -> Found:
    name = meta["path"] if key is None else key
    return Found(name, meta["size"], tag_of(meta), meta["last_modified"], _version(meta))


def _version(meta: Any) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}
