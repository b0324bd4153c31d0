"""A claim on a prefix of a bucket: an object that names its holder, which renews it while it lives.

Conditional writes see to it that one of several processes gets it. The claim of a process of this machine that has
ended is free at once, and any other after STALE_S seconds without renewal. Times are the store's own, so clocks of
different machines need not agree.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loaders.errors import StorageError
from loaders.storage.base import Entry
from loaders.storage.objects.answers import Unmet
from loaders.storage.objects.client import Found, ObjectClient, Version
from loaders.storage.objects.store import found_at, read_object, say_once
from loaders.storage.patience import Passing

BEAT_S = 20.0  # between two renewals
STALE_S = 180.0  # without renewal, after which a claim is free: several renewals may fail
LIMIT = 4096  # bytes of a claim; others' are not read
CLOCK = "clock"  # an object that is written to learn what time it is at the store


class ObjectClaim:
    """The claim of one job on one output; `is_lost` says that another process took it over."""

    def __init__(self, client: ObjectClient, key: str) -> None:
        self._client = client
        self._key = key
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        self.is_lost = False

    @contextmanager
    def held(self) -> Iterator[str | None]:
        """Hold the claim during the block; yields its holder, "HOST pid N", if another process has it."""
        mine, other = self._taken()
        if mine is None:
            yield other
            return
        self._check_conditions()
        beating = threading.Thread(target=self._beat, args=(mine,), name="claim", daemon=True)
        beating.start()
        try:
            yield None
        finally:
            self._ended.set()
            beating.join()
            if not self.is_lost:
                self._client.patient(self._what, lambda: self._client.delete([self._key]))

    @property
    def _what(self) -> str:
        return self._client.what("claiming", self._key)

    def _text(self) -> bytes:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "token": self._token}
        return json.dumps({**owner, "beat": time.time()}).encode()

    def _taken(self) -> tuple[Version | None, str]:
        """Try to get the claim: returns its version, or None and who has it."""
        there = found_at(self._client, self._key)
        owner = owner_of(self._client, there)
        if there is not None and owner.get("token") != self._token and not self._is_free(there, owner):
            return None, name_of(owner)
        try:
            return self._put("create" if there is None else there.version), ""
        except Unmet:
            there = found_at(self._client, self._key)
            owner = owner_of(self._client, there)
            # The answer to the request that made it was lost, and it was made again.
            if there is not None and owner.get("token") == self._token:
                return there.version, ""
            return None, name_of(owner)

    def _put(self, condition: Any) -> Version:
        return self._client.patient(self._what, lambda: self._client.put(self._key, self._text(), condition))

    def _is_free(self, there: Found, owner: dict[str, Any]) -> bool:
        if has_ended(owner):
            return True
        clock = f"{self._key.rpartition('/')[0]}/{CLOCK}"
        self._client.patient(self._what, lambda: self._client.put(clock, b""))
        now = found_at(self._client, clock)
        return now is not None and (now.changed - there.changed).total_seconds() > STALE_S

    def _check_conditions(self) -> None:
        """Notice a store that ignores conditions: it lets the claim be created though it is there."""
        with suppress(Unmet):
            self._put("create")
            say_once(
                f"{self._what}: this store has no conditional writes, so it would not be noticed if two jobs wrote one"
                " output at once"
            )

    def _beat(self, mine: Version) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                mine = self._client.put(self._key, self._text(), mine)
            except Unmet:
                there = found_at(self._client, self._key)
                if there is None or owner_of(self._client, there).get("token") != self._token:
                    self.is_lost = True
                    return
                mine = there.version
            # The next beat comes early enough.
            except (Passing, StorageError):
                continue
            # Whatever else is wrong, the work itself will meet it, and say so.
            except Exception as error:
                say_once(f"{self._what}: it cannot be renewed ({type(error).__name__})")

    def check(self) -> None:
        """Check that the claim is still this process's.

        Raises:
            StorageError: another process took it over.
        """
        if self.is_lost:
            raise StorageError(
                f"{self._what}: this process did not reach the store for {STALE_S:g} s, and another one took the job"
                " over; let that one finish"
            )


def owner_of(client: ObjectClient, there: Found | None) -> dict[str, Any]:
    """Return what a claim says of its holder; nothing if it cannot be read."""
    if there is None or there.size > LIMIT:
        return {}
    try:
        text = read_object(client, there.key, Entry(there.key, there.size, there.tag), 0, there.size)
        found = json.loads(bytes(text))
    # It was renewed or given back meanwhile, or is damaged.
    except (StorageError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def name_of(owner: dict[str, Any]) -> str:
    """Return a holder's name for messages."""
    if not isinstance(owner.get("host"), str) or not isinstance(owner.get("pid"), int):
        return "unknown"
    return f"{owner['host'][:100]} pid {owner['pid']}"


def has_ended(owner: dict[str, Any]) -> bool:
    """Whether a claim's holder was a process of this machine, and is no more."""
    if owner.get("machine") != _machine() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    # It belongs to somebody else, or the number is none.
    except (PermissionError, OverflowError):
        return False
    return False


def _machine() -> str:
    """Return what tells machines and containers apart, whose process ids are their own."""
    known = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        # Other systems have none of this.
        with suppress(OSError):
            known.append(str(Path(path).readlink()) if "ns" in path else Path(path).read_text().strip())
    return " ".join(known)
