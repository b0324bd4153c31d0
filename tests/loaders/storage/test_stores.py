"""What holds of every store, over a folder and over objects on a server."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.errors import BadCheckpoint, BadSpec, StorageError
from loaders.places import ROOT
from loaders.storage import destination_at, open_store
from loaders.storage.address import Address
from loaders.storage.base import PinnedFiles
from loaders.storage.hashes import digest, hash_stored
from tests.shelf.places import Place

DATA = bytes(range(256)) * 5000


@pytest.fixture
def filled(place: Place) -> Place:
    place.put("a.bin", DATA)
    place.put("b/c.json", b"{}")
    return place


def test_files_are_listed_by_their_paths_with_sizes(filled: Place) -> None:
    store = open_store(filled.address)
    assert store.absence() is None
    assert [(entry.name, entry.size) for entry in store.list()] == [("a.bin", len(DATA)), ("b/c.json", 2)]
    assert [entry.name for entry in store.list(deep=False)] == ["a.bin"]
    assert store.find("a.bin") == store.list()[0]
    assert store.find("b") is None
    assert store.find("no") is None
    assert store.is_local == (store.local_path("a.bin") is not None)


def test_where_nothing_is_nothing_is_listed(place: Place) -> None:
    store = open_store(place.address / "no")
    assert store.absence() == "nothing there"
    assert store.list() == ()
    assert store.find("a.bin") is None


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "b/../../x"])
def test_names_that_lead_out_are_refused(name: str, filled: Place) -> None:
    with pytest.raises(BadCheckpoint, match="leads out of"):
        open_store(filled.address / "b").find(name)


def test_ranges_are_read_as_they_are_asked_for(filled: Place) -> None:
    store = open_store(filled.address)
    entry = store.list()[0]
    assert bytes(store.read(entry, 0, entry.size)) == DATA
    assert bytes(store.read(entry, 7, 7)) == b""
    ranges = [(5, 300), (1_000_000, 1_000_001), (0, 4)]
    assert [bytes(part) for part in store.read_ranges(entry, ranges)] == [DATA[start:stop] for start, stop in ranges]
    with pytest.raises(BadCheckpoint, match=r"a\.bin: it ends at byte"):
        store.read(entry, 0, len(DATA) + 1)
    assert hash_stored(store, entry, 10, 900_000) == hash_stored(store, entry, 10, 900_000) != hash_stored(store, entry)


def test_another_version_is_never_read(filled: Place) -> None:
    store = open_store(filled.address)
    files = PinnedFiles(store, store.list())
    filled.put("a.bin", DATA[::-1])
    with pytest.raises(BadCheckpoint, match=r"a\.bin.* it changed while it was read"):
        files.read("a.bin", 0, 10)
    assert bytes(PinnedFiles(store).read("a.bin", 0, 3)) == DATA[::-1][:3]


def test_a_file_that_is_gone_is_named(filled: Place) -> None:
    store = open_store(filled.address)
    entry = store.list()[0]
    filled.drop("a.bin")
    with pytest.raises(StorageError, match=r"a\.bin"):
        store.read(entry, 0, 10)
    with pytest.raises(BadCheckpoint, match=r"a\.bin: not found in"):
        PinnedFiles(store).entry("a.bin")


def test_small_files_are_read_within_a_limit(filled: Place) -> None:
    files = PinnedFiles(open_store(filled.address))
    assert files.read_all("b/c.json", 2) == b"{}"
    with pytest.raises(BadCheckpoint, match=r"b/c\.json: 2 bytes, at most 1 are read"):
        files.read_all("b/c.json", 1)


def test_a_file_can_be_read_as_a_stream(filled: Place) -> None:
    with PinnedFiles(open_store(filled.address)).open("a.bin") as file:
        assert file.read(10) == DATA[:10]
        file.seek(-4, 2)
        assert file.read() == DATA[-4:]
        with pytest.raises(OSError, match="seek"):
            file.seek(-len(DATA) - 1, 2)


def test_a_store_is_opened_by_its_address_in_another_process(filled: Place) -> None:
    entry = open_store(filled.address).list()[0]
    code = (
        "import pickle, sys; from tests.shelf import register; register();"
        "from loaders.storage import open_store; from loaders.storage.hashes import digest;"
        "address, entry = pickle.load(sys.stdin.buffer);"
        "print(digest(bytes(open_store(address).read(entry, 0, entry.size))))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps((filled.address, entry)), cwd=ROOT, capture_output=True,
        check=True,
    )  # fmt: skip
    assert ran.stdout.decode().strip() == digest(DATA)


def test_addresses() -> None:
    url, path = Address.of("s3://bucket/a/b/"), Address.of("/x/y/")
    assert (str(url), url.scheme, url.is_local, url.name) == ("s3://bucket/a/b", "s3", False, "b")
    assert (str(path), path.scheme, path.is_local, path.name) == ("/x/y", "file", True, "y")
    assert Address.of("file:///x/y") == path
    assert (url / "c", path / "c") == (Address.of("s3://bucket/a/b/c"), Address.of("/x/y/c"))
    assert [str(above) for above in url.parents] == ["s3://bucket/a", "s3://bucket"]
    assert [str(above) for above in path.parents] == ["/x", "/"]
    with pytest.raises(BadSpec, match="expected a path of this machine"):
        _ = url.path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("s3:/bucket/a", "s3://bucket/a"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        ("S3://bucket/a", "s3://bucket/a"),
        ("https:/me:secret@host/a", r"https://\*\*\*@host/a"),
        ("file:/a", "file:///a"),
    ],
)
def test_a_url_with_a_slip_is_not_taken_for_a_folder(given: str | Path, meant: str) -> None:
    with pytest.raises(BadSpec, match=f"expected a path or a URL, as {meant}; found") as caught:
        Address.of(given)
    assert "secret" not in str(caught.value)
    for path in ("./s3:/bucket/a", "/x/s3:/a", "a:b/c", "C:/x"):
        assert Address.of(path).is_local


def test_a_scheme_that_is_not_known_is_refused() -> None:
    for use in (open_store, lambda address: destination_at(address, "0" * 12)):
        with pytest.raises(BadSpec, match="xyz:// is not read or written"):
            use(Address.of("xyz://host/a"))
