"""Assembling a large object of others that are in its bucket, which an S3 copies by itself.

An S3's parts have at least 5 MiB, so what is shorter, and what is no object yet (a header), is joined with bytes from
the beginning of what follows, which are fetched and sent again: some MiB for each such place, however large the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from loaders.errors import StorageError, WeightmillError
from loaders.storage.base import Entry
from loaders.storage.objects.answers import Missing, NotOffered
from loaders.storage.objects.client import Found, ObjectClient
from loaders.storage.objects.parts import LARGEST_PART, MOST_PARTS, SMALLEST_PART, Part, md5
from loaders.storage.objects.store import found_at, read_object, say_once
from loaders.storage.objects.upload import AT_ONCE, BLOCK, PART, upload


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes [start, stop) of an object, which the store copies."""

    source: Found
    start: int
    stop: int


Source = Found | Copied | bytes  # an object of the same bucket, a range of one, or bytes at hand


def parts_for(sources: Sequence[Source], size: int) -> Iterator[Copied | list[Copied | bytes]]:
    """Yield the parts of an object, in order: ranges that the store copies, and lists of what is sent together.

    All but the last have at least SMALLEST_PART bytes.
    """
    largest = min(LARGEST_PART, max(1 << 30, -(-2 * size // MOST_PARTS)))
    held: list[Copied | bytes] = []
    count = 0
    for source in map(_as_range, sources):
        at, end = (0, len(source)) if isinstance(source, bytes) else (source.start, source.stop)
        while at < end:
            left = end - at
            if not held and isinstance(source, Copied) and left >= SMALLEST_PART:
                # No rest is left that would be too short to be copied.
                taken = left if left <= largest else min(largest, left - SMALLEST_PART)
                yield Copied(source.source, at, at + taken)
                at += taken
                continue
            taken = min(left, SMALLEST_PART - count)
            held.append(source[at : at + taken] if isinstance(source, bytes) else Copied(source.source, at, at + taken))
            count, at = count + taken, at + taken
            if count >= SMALLEST_PART:
                yield held
                held, count = [], 0
    if held:
        yield held


def _as_range(source: Source) -> Copied | bytes:
    return Copied(source, 0, source.size) if isinstance(source, Found) else source


def assemble(client: ObjectClient, key: str, sources: Sequence[Source], size: int) -> Found:
    """Make an object of `size` bytes of others and of bytes, in order; returns its version.

    Raises:
        StorageError: it cannot be made; nothing is left of it then.
    """
    parts = list(parts_for(sources, size))
    if size > PART and len(parts) <= MOST_PARTS:
        try:
            return _copied(client, key, parts, size)
        except NotOffered as error:
            say_once(f"{error}: pieces of a file are fetched, and sent again in one")
    return upload(client, key, _blocks(client, sources), size)


def _copied(client: ObjectClient, key: str, parts: Sequence[Copied | list[Copied | bytes]], size: int) -> Found:
    what = client.what("joining", key)
    name = client.in_parts(what, lambda parts: parts.begin(key))

    def make(number: int, part: Copied | list[Copied | bytes]) -> Part:
        if isinstance(part, Copied):
            source, start, stop = part.source.key, part.start, part.stop
            return client.in_parts(what, lambda parts: parts.copy(key, name, number, source, start, stop))
        data = b"".join(each if isinstance(each, bytes) else _fetched(client, each) for each in part)
        return client.in_parts(what, lambda parts: parts.put(key, name, number, data, md5(data)))

    try:
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="join") as pool:
            made = list(pool.map(make, range(1, len(parts) + 1), parts))
        client.in_parts(what, lambda parts: parts.complete(key, name, made))
    except BaseException:
        # The first error is the one to report; what is left, `weightmill clean` finds.
        with suppress(WeightmillError, Missing):
            client.in_parts(what, lambda parts: parts.abort(key, name), patience_s=0.0)
        raise
    found = found_at(client, key)
    if found is None or found.size != size:
        there = "nothing" if found is None else f"{found.size} bytes"
        raise StorageError(f"{what}: expected {size} bytes there, found {there}; run the same command again")
    return found


def _blocks(client: ObjectClient, sources: Sequence[Source]) -> Iterator[bytes]:
    for source in map(_as_range, sources):
        if isinstance(source, bytes):
            yield source
            continue
        for at in range(source.start, source.stop, BLOCK):
            yield _fetched(client, Copied(source.source, at, min(at + BLOCK, source.stop)))


def _fetched(client: ObjectClient, part: Copied) -> bytes:
    entry = Entry(part.source.key, part.source.size, part.source.tag)
    return bytes(read_object(client, part.source.key, entry, part.start, part.stop))
