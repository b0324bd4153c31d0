"""Uploads to buckets and claims on outputs there: what is confirmed, tried again, taken over and cleaned up."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from loaders.errors import StorageError
from loaders.storage import kind_of, open_store
from loaders.storage.address import Address
from loaders.storage.hashes import hash_stored
from loaders.storage.objects import claim as object_claim
from loaders.storage.objects.answers import NotOffered
from loaders.storage.objects.assembly import Copied, parts_for
from loaders.storage.objects.claim import ObjectClaim
from loaders.storage.objects.client import Found, ObjectClient, client_of
from loaders.storage.objects.destination import ObjectDestination
from loaders.storage.objects.parts import SMALLEST_PART, Part, S3Parts, md5
from loaders.storage.patience import Passing
from loaders.storage.settings import current, use
from tests.shelf.places import OBJECTS, Place, contents

KEY = "0123456789abcdef"
MIB = 1 << 20
DATA = os.urandom(17 * MIB)


@pytest.fixture(autouse=True)
def settings(tmp_path: Path) -> Iterator[Path]:
    before, scratch = current(), tmp_path / "scratch"
    use(replace(before, patience_s=10.0, scratch=str(scratch)))
    yield scratch
    use(before)


@pytest.fixture(params=OBJECTS)
def output(place_of: Callable[[str], Place], request: pytest.FixtureRequest) -> Address:
    return place_of(request.param).address / "out"


@pytest.fixture
def s3_output(place_of: Callable[[str], Place]) -> Address:
    return place_of("s3").address / "out"


def prepared(output: Address) -> ObjectDestination:
    made = ObjectDestination(output, KEY)
    made.prepare(overwrite=False)
    return made


def part(made: ObjectDestination, data: bytes) -> Path:
    path = made.scratch("part")
    path.write_bytes(data)
    return path


def under_way(output: Address) -> list[str]:
    client, prefix = client_of(output)
    return [each.key for each in client.in_parts("", lambda parts: parts.left(prefix))]


def test_a_large_file_is_uploaded_in_parts(output: Address) -> None:
    made = prepared(output)
    entry = made.keep(part(made, DATA), "files/model.bin")
    assert contents(output) == {"model.bin": DATA}
    found = open_store(output).find("model.bin")
    assert found is not None
    assert (entry.size, entry.tag) == (found.size, found.tag)
    client, _ = client_of(output)
    assert client.traffic.uploaded >= len(DATA)
    made.forget()


def test_a_part_is_tried_again_by_itself(s3_output: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    made, honest, numbers = prepared(s3_output), S3Parts.put, list[int]()

    def failing(self: S3Parts, key: str, upload: str, number: int, data: bytes, digest: bytes) -> Part:
        numbers.append(number)
        if numbers.count(2) == 1 and number == 2:
            raise Passing("busy", is_busy=True)
        return honest(self, key, upload, number, data, digest)

    monkeypatch.setattr(S3Parts, "put", failing)
    made.keep(part(made, DATA), "files/model.bin")
    assert sorted(numbers) == [1, 2, 2, 3]
    assert contents(s3_output) == {"model.bin": DATA}


def test_an_upload_that_fails_leaves_nothing(s3_output: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    made, honest = prepared(s3_output), S3Parts.put

    def failing(self: S3Parts, key: str, upload: str, number: int, data: bytes, digest: bytes) -> Part:
        if number == 3:
            raise StorageError("uploading: refused")
        return honest(self, key, upload, number, data, digest)

    monkeypatch.setattr(S3Parts, "put", failing)
    with pytest.raises(StorageError, match="uploading: refused"):
        made.keep(part(made, DATA), "files/model.bin")
    assert contents(s3_output) == {}
    assert under_way(s3_output) == []


def test_bytes_that_arrive_otherwise_are_noticed(s3_output: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    made, honest = prepared(s3_output), S3Parts.put

    def damaging(self: S3Parts, key: str, upload: str, number: int, data: bytes, digest: bytes) -> Part:
        sent = data if number != 2 else data[:-1] + bytes([data[-1] ^ 1])
        return replace(honest(self, key, upload, number, sent, md5(sent)), is_confirmed=False)

    monkeypatch.setattr(S3Parts, "put", damaging)
    with pytest.raises(StorageError, match=r"model\.bin: what is stored is not what was sent"):
        made.keep(part(made, DATA), "files/model.bin")
    assert contents(s3_output) == {}


def test_a_small_file_that_arrives_otherwise_is_noticed(output: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    made, honest = prepared(output), ObjectClient.put

    def damaging(self: ObjectClient, key: str, data: bytes, *more: Any) -> Any:
        return honest(self, key, data[:-1] + b"!" if data else data, *more)

    monkeypatch.setattr(ObjectClient, "put", damaging)
    with pytest.raises(StorageError, match="what is stored is not what was sent"):
        made.keep(part(made, b"weights"), "files/model.bin")
    assert contents(output) == {}


def test_an_answer_to_the_last_request_may_be_lost(s3_output: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    made, honest, asked = prepared(s3_output), S3Parts.complete, list[str]()

    def losing(self: S3Parts, key: str, upload: str, parts: Any) -> None:
        honest(self, key, upload, parts)
        asked.append(key)
        if len(asked) == 1:
            raise Passing("the connection was cut")

    monkeypatch.setattr(S3Parts, "complete", losing)
    made.keep(part(made, DATA), "files/model.bin")
    assert contents(s3_output) == {"model.bin": DATA}


def test_scratch_is_in_its_folder_and_goes_away(output: Address, settings: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = settings / f"weightmill-upload-{KEY[:12]}-{dead.pid}"
    old.mkdir(parents=True)
    made = prepared(output)
    assert not old.exists()
    path = made.scratch("part")
    assert path.is_relative_to(settings)
    path.write_bytes(b"half")
    made.forget()
    assert list(settings.iterdir()) == []


# --- what is left


def test_uploads_that_were_left_are_found_and_removed(s3_output: Address) -> None:
    client, key = client_of(s3_output / "model.bin")
    name = client.in_parts("", lambda parts: parts.begin(key))
    client.in_parts("", lambda parts: parts.put(key, name, 1, DATA[:SMALLEST_PART], md5(DATA[:SMALLEST_PART])))
    kind = kind_of(s3_output)
    assert kind.abandoned(s3_output.parent, None) == ()  # it may be somebody else's
    client.put(client_of(s3_output / "weightmill.json")[1], b"{}")
    [left] = kind.abandoned(s3_output.parent, None)
    assert left.size == SMALLEST_PART
    kind.discard(left.address)
    assert kind.abandoned(s3_output.parent, None) == ()
    name = client.in_parts("", lambda parts: parts.begin(key))
    prepared(s3_output).forget()
    assert under_way(s3_output) == []


def test_the_files_of_an_unfinished_output_go_with_its_journal_and_others_stay(output: Address) -> None:
    made = prepared(output)
    made.keep(part(made, b"weights"), "files/model.bin")
    made.put("files/tokenizer.json", b"{}")
    client, key = client_of(output / "notes.txt")
    client.put(key, b"mine")
    assert [entry.name for entry in made.list("files")] == ["model.bin", "tokenizer.json"]
    kind = kind_of(output)
    [left] = kind.abandoned(output.parent, "out")
    kind.discard(left.address)
    assert contents(output) == {"notes.txt": b"mine"}


# --- claims


def held_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_claim, "_machine", lambda: "another machine")


def test_the_claim_of_a_process_that_ended_is_free(output: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: ended.pid)
        claim = ObjectDestination(output, KEY)._claim
        claim._put("create")
    with ObjectDestination(output, KEY).claim() as other:
        assert other is None


def test_a_claim_of_another_machine_is_free_when_it_is_old(output: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ObjectDestination(output, KEY)
    with first.claim() as other:
        assert other is None
        with monkeypatch.context() as patch:
            held_elsewhere(patch)
            with ObjectDestination(output, KEY).claim() as other:
                assert other is not None
            patch.setattr(object_claim, "STALE_S", -1.0)
            second = ObjectDestination(output, KEY)
            with second.claim() as other:
                assert other is None
                # The first one notices it when it renews its claim, and writes nothing any more.
                patch.setattr(object_claim, "BEAT_S", 0.0)
                first._claim._beat({"e_tag": '"0"', "version": "1"})
                with pytest.raises(StorageError, match="another one took the job over"):
                    first.put("files/a", b"")
                second.put("files/a", b"")


def test_a_claim_is_renewed(output: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ObjectDestination(output, KEY)
    claim: ObjectClaim = made._claim
    version, _ = claim._taken()
    assert version is not None
    beats = iter([False, False, True])
    monkeypatch.setattr(claim._ended, "wait", lambda _: next(beats))
    claim._beat(version)
    assert not claim.is_lost


def test_a_store_without_conditions_is_noticed(
    s3_output: Address, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = ObjectClient.put
    monkeypatch.setattr(ObjectClient, "put", lambda self, key, data, condition=None: honest(self, key, data))
    for _ in range(2):
        with ObjectDestination(s3_output, KEY).claim() as other:
            assert other is None
    assert caplog.text.count("no conditional writes") == 1


# --- files of several pieces


def length_of(each: Copied | bytes) -> int:
    return len(each) if isinstance(each, bytes) else each.stop - each.start


def found(size: int) -> Found:
    return Found(f"{size}", size, '"x"', datetime.now(UTC), {})


@pytest.mark.parametrize(
    "sizes",
    [
        [100, SMALLEST_PART, SMALLEST_PART + 1, 7],
        [12 * MIB, 40 * MIB, 3, 4, 5],
        [1, 5 << 30, 2, 6 << 30],
        [1, 2, 3],
        [3 * MIB] * 9,
    ],
)
def test_parts_have_the_sizes_that_a_store_takes(sizes: list[int]) -> None:
    sources: list[Found | bytes] = [bytes(min(sizes[0], MIB)), *(found(size) for size in sizes[1:])]
    parts = list(parts_for(sources, sum(sizes)))
    lengths = [sum(map(length_of, each if isinstance(each, list) else [each])) for each in parts]
    assert sum(lengths) == min(sizes[0], MIB) + sum(sizes[1:])
    assert all(length >= SMALLEST_PART for length in lengths[:-1])
    assert all(length <= 5 << 30 for length in lengths)
    sent = sum(length for part, length in zip(parts, lengths, strict=True) if not isinstance(part, Copied))
    assert sent <= SMALLEST_PART * (1 + len(sizes))


def test_a_file_is_assembled_by_the_store(s3_output: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(s3_output)
    pieces = {
        "pieces/one": DATA[: 9 * MIB],
        "pieces/two": DATA[9 * MIB : 9 * MIB + 5],
        "pieces/three": DATA[-7 * MIB :],
    }
    places, at = [], 1000
    for name, data in pieces.items():
        made.keep(part(made, data), name)
        places.append((at, name))
        at += len(data)
    head, tail = b"h" * 1000, b"tail"
    client, _ = client_of(s3_output)
    before = client.traffic.uploaded
    made.assemble("files/model.gguf", places, [(0, head), (at, tail)], at + len(tail))
    assert contents(s3_output) == {"model.gguf": head + b"".join(pieces.values()) + tail}
    assert client.traffic.uploaded - before <= 3 * SMALLEST_PART
    assert made.list("pieces") == ()
    made.assemble("files/model.gguf", places, [(0, head), (at, tail)], at + len(tail))  # once more, after an interrupt
    entry = made.files.find("model.gguf")
    assert entry is not None
    digest = hash_stored(made.files, entry, 1000, 9 * MIB)
    piece = replace(entry, name="files/model.gguf", size=9 * MIB)
    assert made.holds(piece, digest, 1000)
    assert not made.holds(piece, digest, 1001)


@pytest.mark.parametrize("copies", [True, False])
def test_a_file_is_assembled_again_when_some_pieces_are_gone(
    copies: bool, s3_output: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: Any) -> None:
        raise NotOffered("joining again: the store does not offer this")

    if not copies:
        monkeypatch.setattr(S3Parts, "copy", refusing)
    made = prepared(s3_output)
    whole = b"h" * 7 + DATA + b"tail"
    cuts = [7, 7 + 6 * MIB, 7 + 6 * MIB + 9, 7 + len(DATA)]
    places = [(start, f"pieces/{start}") for start in cuts[:-1]]
    for start, stop in itertools.pairwise(cuts):
        made.keep(part(made, whole[start:stop]), f"pieces/{start}")
    rest = [(0, b"h" * 7), (cuts[-1], b"tail")]

    def killed(name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(made, "drop", killed)
        with pytest.raises(KeyboardInterrupt):
            made.assemble("files/model.gguf", places, rest, len(whole))
    made.drop(places[0][1])
    made.drop(places[1][1])
    made.assemble("files/model.gguf", places, rest, len(whole))
    assert contents(s3_output) == {"model.gguf": whole}
    assert made.list("pieces") == ()


def test_where_a_store_does_not_copy_the_pieces_are_sent_again(
    s3_output: Address, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusing(*_: Any) -> None:
        raise NotOffered("joining: the store does not offer this")

    monkeypatch.setattr(S3Parts, "copy", refusing)
    made = prepared(s3_output)
    made.keep(part(made, DATA), "pieces/one")
    made.assemble("files/model.gguf", [(2, "pieces/one")], [(0, b"hh")], len(DATA) + 2)
    assert contents(s3_output) == {"model.gguf": b"hh" + DATA}
    assert "sent again" in caplog.text
    assert under_way(s3_output) == []
