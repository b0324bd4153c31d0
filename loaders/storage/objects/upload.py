"""Uploading files of any size: in parts, from little memory, each tried again by itself, and all of them confirmed."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from loaders.errors import StorageError, WeightmillError, io_errors
from loaders.storage.base import Entry
from loaders.storage.objects.answers import Denied, Missing
from loaders.storage.objects.client import Found, ObjectClient, tag_of
from loaders.storage.objects.parts import MOST_PARTS, Part, md5
from loaders.storage.objects.store import found_at, read_object
from loaders.storage.patience import Passing

PART = 8 << 20  # bytes of a part, unless there would be too many of them
AT_ONCE = 4  # parts in flight, each of which is in memory
BLOCK = 4 << 20  # bytes that are read back at once


def file_blocks(path: Path) -> Iterator[bytes]:
    """Yield a local file's bytes in order."""
    with io_errors("reading", path), path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            yield block


def part_size(size: int) -> int:
    """Return the bytes of each part of a file but its last."""
    least = -(-size // MOST_PARTS)
    return max(PART, -(-least // (1 << 20)) * (1 << 20))


def upload(client: ObjectClient, key: str, blocks: Iterator[bytes], size: int) -> Found:
    """Make an object of `size` bytes from its blocks, which come in order; returns its version.

    Raises:
        StorageError: it cannot be uploaded, or what is stored is not what was sent; nothing is left of it then.
    """
    if size <= PART:
        return _whole(client, key, b"".join(blocks), size)
    return _InParts(client, key).run(blocks, size) if client.has_parts else _by_the_library(client, key, blocks, size)


def _whole(client: ObjectClient, key: str, data: bytes, size: int) -> Found:
    what = client.what("uploading", key)
    _check_length(what, len(data), size)
    made = client.patient(what, lambda: client.put(key, data))
    is_confirmed = tag_of(made).strip('"').lower() == md5(data).hex()
    return _confirmed(client, key, size, [] if is_confirmed else [(0, size, md5(data))], made.get("e_tag"))


def _by_the_library(client: ObjectClient, key: str, blocks: Iterator[bytes], size: int) -> Found:
    """Upload by obstore, with its own retries of parts, where it alone can; the object is read back afterwards."""
    hasher, count = hashlib.md5(usedforsecurity=False), 0

    def passed() -> Iterator[bytes]:
        nonlocal count
        for block in blocks:
            hasher.update(block)
            count += len(block)
            client.traffic.moved(uploaded=len(block))
            yield block

    what = client.what("uploading", key)
    try:
        client.put_stream(key, passed(), part_size(size), AT_ONCE)
    except Passing as failure:
        raise StorageError(f"{what}: {failure}: run the same command again later, it goes on where it was") from None
    except Denied as denial:
        raise client.denied(what, denial) from None
    _check_length(what, count, size)
    return _confirmed(client, key, size, [(0, size, hasher.digest())])


def _check_length(what: str, found: int, size: int) -> None:
    if found != size:
        raise StorageError(f"{what}: it has {found} bytes, expected {size}; run the same command again")


class _InParts:
    """An upload in parts."""

    def __init__(self, client: ObjectClient, key: str) -> None:
        self._client = client
        self._key = key
        self._what = client.what("uploading", key)
        self._digests: dict[int, tuple[int, bytes]] = {}  # by part: its bytes, and their MD5

    def run(self, blocks: Iterator[bytes], size: int) -> Found:
        client, key = self._client, self._key
        name = client.in_parts(self._what, lambda parts: parts.begin(key))
        try:
            made = self._put_all(name, blocks, size)
            self._complete(name, made, size)
        except BaseException:
            # The first error is the one to report; what is left, `weightmill clean` finds.
            with suppress(WeightmillError, Missing):
                client.in_parts(self._what, lambda parts: parts.abort(key, name), patience_s=0.0)
            raise
        is_confirmed = all(part.is_confirmed for part in made)
        return _confirmed(client, key, size, [] if is_confirmed else self._ranges())

    def _ranges(self) -> list[tuple[int, int, bytes]]:
        """Return the parts' places in the object: from, to, and the MD5 of what is there."""
        found, at = [], 0
        for count, digest in (self._digests[number] for number in sorted(self._digests)):
            found.append((at, at + count, digest))
            at += count
        return found

    def _put_all(self, name: str, blocks: Iterator[bytes], size: int) -> list[Part]:
        ahead: deque[Future[Part]] = deque()
        made: list[Part] = []
        count = 0
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="upload") as pool:
            try:
                for number, data in enumerate(_regrouped(blocks, part_size(size)), 1):
                    count += len(data)
                    if len(ahead) >= AT_ONCE:
                        made.append(ahead.popleft().result())
                    ahead.append(pool.submit(self._put, name, number, data))
                made += [future.result() for future in ahead]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        _check_length(self._what, count, size)
        return made

    def _put(self, name: str, number: int, data: bytes) -> Part:
        digest = md5(data)
        self._digests[number] = (len(data), digest)
        part = self._client.in_parts(self._what, lambda parts: parts.put(self._key, name, number, data, digest))
        self._client.traffic.moved(uploaded=len(data))
        return part

    def _complete(self, name: str, made: list[Part], size: int) -> None:
        try:
            self._client.in_parts(self._what, lambda parts: parts.complete(self._key, name, made))
        except Missing:
            # An answer that was lost: the upload is complete, and there is none under its name any more.
            there = found_at(self._client, self._key)
            if there is None or there.size != size or there.tag != self._tag:
                raise StorageError(f"{self._what}: the upload is gone; run the same command again") from None

    @property
    def _tag(self) -> str:
        """The tag that S3 gives to an object of these parts."""
        return f'"{md5(b"".join(digest for _, _, digest in self._ranges())).hex()}-{len(self._digests)}"'


def _regrouped(blocks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Yield the bytes of blocks in pieces of one size; the last is shorter."""
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def _confirmed(
    client: ObjectClient, key: str, size: int, ranges: Sequence[tuple[int, int, bytes]], tag: str | None = None
) -> Found:
    """Check that an object is what was sent: its size, and what is in ranges (from, to, MD5), which are read back.

    Raises:
        StorageError: it is not; it is removed.
    """
    what, there = client.what("uploading", key), found_at(client, key)
    if there is None:
        raise StorageError(f"{what}: it was uploaded and is not there; run the same command again")
    fault = f"{there.size} bytes arrived, expected {size}" if there.size != size else None
    if tag is not None and there.tag != tag_of({"e_tag": tag}):
        fault = "another version is there than was written: somebody else writes to it"
    if fault is None and not all(_stored(client, there, start, stop) == digest for start, stop, digest in ranges):
        fault = "what is stored is not what was sent"
    if fault is not None:
        client.patient(what, lambda: client.delete([key]))
        raise StorageError(f"{what}: {fault}; run the same command again")
    return there


def _stored(client: ObjectClient, there: Found, start: int, stop: int) -> bytes:
    """Return the MD5 of a range of an object, which is read."""
    entry, hasher = Entry(there.key, there.size, there.tag), hashlib.md5(usedforsecurity=False)
    for at in range(start, stop, BLOCK):
        hasher.update(read_object(client, there.key, entry, at, min(at + BLOCK, stop)))
    return hasher.digest()


def size_of(path: Path) -> int:
    """Return the bytes of a local file."""
    with io_errors("looking at", path):
        return os.stat(path).st_size  # noqa: PTH116
