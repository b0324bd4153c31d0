"""What holds of every destination: nothing is seen before it is published, and then all of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders.errors import BadSpec
from loaders.storage import destination_at, kind_of, open_store
from loaders.storage.address import Address
from loaders.storage.base import Destination, PinnedFiles
from loaders.storage.copying import copy_into
from loaders.storage.hashes import hash_stored
from loaders.storage.settings import StoreSettings
from tests.shelf.places import REMOTE, Place, contents

KEY = "0123456789abcdef"


@pytest.fixture
def output(place: Place) -> Address:
    return place.address / "out"


@pytest.fixture
def destination(output: Address) -> Destination:
    made = destination_at(output, KEY)
    made.prepare(overwrite=False)
    return made


def write(destination: Destination, name: str, data: bytes) -> str:
    """Make a finished file; its xxh3-128."""
    part = destination.scratch(f"part-{name.replace('/', '%')}")
    part.write_bytes(data)
    entry = destination.keep(part, name)
    assert not part.exists()
    area, _, rest = name.partition("/")
    found = (destination.files if area == "files" else destination.pieces).find(rest)
    assert found is not None
    assert (found.size, found.tag) == (entry.size, entry.tag)
    return hash_stored(destination.files if area == "files" else destination.pieces, found)


def finish(output: Address, *, overwrite: bool = False, key: str = KEY, more: str = "") -> None:
    made = destination_at(output, key)
    made.prepare(overwrite=overwrite)
    for entry in made.list("files"):
        made.drop(f"files/{entry.name}")
    write(made, f"files/model{more}.bin", b"weights")
    made.stage("config.json", b"{}")
    made.stage("weightmill.json", more.encode())
    made.publish(overwrite=overwrite)
    made.forget()


def test_small_files_of_the_journal(destination: Destination) -> None:
    assert destination.is_there()
    assert destination.get("job.json") is None
    destination.put("job.json", b"1")
    destination.put("job.json", b"22")
    destination.put("records/unit-00001.json", b"3")
    assert destination.get("job.json") == b"22"
    assert [entry.name for entry in destination.list("records")] == ["unit-00001.json"]
    destination.drop("job.json")
    destination.drop("job.json")
    assert destination.get("job.json") is None


def test_nothing_is_seen_before_it_is_published_and_then_all(destination: Destination, output: Address) -> None:
    write(destination, "files/model-00001.bin", b"weights")
    write(destination, "files/sub/extra.bin", b"more")
    destination.stage("index.json", b"[]")
    destination.stage("config.json", b"{}")
    assert open_store(output).absence() is not None
    assert open_store(output).find("config.json") is None
    staged = destination.files
    assert [entry.name for entry in staged.list()] == [
        "config.json", "index.json", "model-00001.bin", "sub/extra.bin"
    ]  # fmt: skip
    assert PinnedFiles(staged).read_all("config.json", 10) == b"{}"
    destination.stage("weightmill.json", b"report")
    destination.publish(overwrite=False)
    destination.forget()
    assert open_store(output).absence() is None
    assert contents(output) == {
        "config.json": b"{}", "index.json": b"[]", "model-00001.bin": b"weights", "sub/extra.bin": b"more",
        "weightmill.json": b"report",
    }  # fmt: skip
    assert not destination_at(output, KEY).is_there()


def test_what_came_to_be_there_is_not_replaced(destination: Destination, output: Address) -> None:
    write(destination, "files/model.bin", b"mine")
    destination.stage("config.json", b"mine")
    finish(output, key="f" * 12, more="theirs")
    with pytest.raises(BadSpec, match="came into being while the job ran"):
        destination.publish(overwrite=False)
    assert contents(output)["config.json"] == b"{}"


def test_an_output_is_replaced_as_a_whole(output: Address) -> None:
    finish(output, more="-old")
    finish(output, more="-new", overwrite=True, key="e" * 12)
    assert contents(output) == {"model-new.bin": b"weights", "config.json": b"{}", "weightmill.json": b"-new"}
    assert kind_of(output).abandoned(output.parent, None) == ()


def test_an_interrupted_publication_is_done_again(
    destination: Destination, output: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(destination, "files/model.bin", b"weights")
    destination.stage("config.json", b"{}")
    destination.stage("weightmill.json", b"report")
    destination.publish(overwrite=False)
    again = destination_at(output, KEY)
    assert contents(output).keys() == {"model.bin", "config.json", "weightmill.json"}
    if not again.is_local:  # nothing was renamed: the same order once more
        again.publish(overwrite=False)
    again.forget()
    assert contents(output)["weightmill.json"] == b"report"


def test_one_driver_at_a_time(output: Address) -> None:
    one, other = destination_at(output, KEY), destination_at(output, KEY)
    with one.claim() as free:
        assert free is None
        with other.claim() as who:
            assert who is not None
            assert who == f"{socket.gethostname()} pid {os.getpid()}"
        [left] = kind_of(output).abandoned(output.parent, None)
        assert left.is_held
    with other.claim() as free:
        assert free is None


def test_what_was_left_is_found_and_removed(destination: Destination, output: Address) -> None:
    write(destination, "pieces/one", b"12345")
    destination.put("records/unit-00001.json", b"{}")
    destination_at(output.parent / "other", KEY).prepare(overwrite=False)
    kind = kind_of(output)
    assert len(kind.abandoned(output.parent, None)) == 2
    [left] = kind.abandoned(output.parent, "out")
    assert (left.address, left.units_done, left.is_held) == (destination.journal, 1, False)
    assert left.size >= 7
    kind.discard(left.address)
    assert kind.abandoned(output.parent, "out") == ()
    assert not destination_at(output, KEY).is_there()


def test_a_file_that_changed_since_is_not_what_a_record_says(destination: Destination) -> None:
    digest = write(destination, "files/model.bin", b"weights")
    found = destination.files.find("model.bin")
    assert found is not None
    written = type(found)("files/model.bin", found.size, found.tag)
    assert destination.holds(written, digest)
    destination.drop("files/model.bin")
    assert not destination.holds(written, digest)
    write(destination, "files/model.bin", b"Weights")
    assert not destination.holds(written, digest)
    write(destination, "files/model.bin", b"weights and more")
    assert not destination.holds(written, digest)


def test_a_file_is_made_of_its_pieces(destination: Destination) -> None:
    for name, data in (("one", b"111"), ("two", b"22")):
        write(destination, f"pieces/{name}", data)
    shared = destination.shared("files/whole.bin", 10)
    assert (shared is not None) == destination.is_local
    if shared is not None:
        assert shared.stat().st_size == 10
        places = [(2, "pieces/one"), (6, "pieces/two")]
        destination.assemble("files/whole.bin", places, [(0, b"hh"), (5, b"-"), (8, b"t")], 9)
    else:
        destination.join("files/whole.bin", iter([b"hh", b"111", b"-", b"22", b"t"]), 9)
        for name in ("one", "two"):
            destination.drop(f"pieces/{name}")
    assert PinnedFiles(destination.files).read_all("whole.bin", 100) == b"hh111-22t"
    assert destination.pieces.list() == ()


def test_files_are_copied_from_a_store_of_any_kind(destination: Destination, place: Place, tmp_path: Path) -> None:
    place.put("m/extra/tokenizer.model", bytes(range(256)) * 40_000)
    copy_into(destination, PinnedFiles(open_store(place.address / "m")), "extra/tokenizer.model")
    assert contents(place.address / "m")["extra/tokenizer.model"] == PinnedFiles(destination.files).read_all(
        "extra/tokenizer.model", 1 << 30
    )


@pytest.mark.parametrize("kind", REMOTE)
def test_large_files_are_copied_without_scratch(
    kind: str, place_of: Callable[[str], Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(bytes(range(256)) * 80_000)
    monkeypatch.setattr("loaders.storage.settings._current", [StoreSettings(scratch_mb=16)])
    destination = destination_at(place_of(kind).address / "out", "0123456789abcdef")
    monkeypatch.setattr(type(destination), "scratch", None)
    with destination.claim():
        destination.prepare(overwrite=False)
        copy_into(destination, PinnedFiles(open_store(tmp_path / "model")), "tokenizer.model")
    found = PinnedFiles(destination.files).read_all("tokenizer.model", 1 << 30)
    assert found == bytes(range(256)) * 80_000
    destination.forget()
