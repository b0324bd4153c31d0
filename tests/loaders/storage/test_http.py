"""Files of HTTP servers: found by their names, read by ranges, and never trusted."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec, StorageError
from loaders.storage import destination_at, open_store
from loaders.storage.address import Address
from loaders.storage.objects.client import client_of
from loaders.storage.settings import StoreSettings, current, use
from tests import object_servers
from tests.making import write_checkpoint
from tests.object_servers import Files

DATA = bytes(range(256)) * 20_000  # more than a body may bring before it breaks without counting as a failure


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(DATA)
    return tmp_path


@pytest.fixture
def served(root: Path) -> Iterator[tuple[Address, type[Files]]]:
    with object_servers.http(root) as (address, server):
        yield address / "m", server


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    before = current()
    use(replace(before, patience_s=0.01))
    yield
    use(before)


def patient() -> None:
    use(replace(current(), patience_s=30.0))


def test_a_model_s_files_are_found_by_what_names_them(root: Path) -> None:
    write_checkpoint(root / "sharded", shards=3)
    (root / "sharded" / "README.md").write_text("a card")
    (root / "sharded" / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own_tokens.T", None], "AutoModel": "org/other--modeling.M"}})
    )
    (root / "sharded" / "own_tokens.py").write_text("class T: ...")
    with object_servers.http(root) as (address, _):
        there = open_checkpoint(root / "sharded")
        found = open_checkpoint(address / "sharded")
        assert [entry.name for entry in found.files] == [entry.name for entry in there.files]
        assert found.fingerprint == there.fingerprint
        assert set(there.aux) - set(found.aux) == {"extra/modeling.py"}  # which nothing names
        assert "own_tokens.py" in found.aux
        assert found.source.read("config.json", 0, 2) == (root / "sharded" / "config.json").read_bytes()[:2]


def test_each_name_is_asked_for_once(root: Path) -> None:
    write_checkpoint(root / "sharded", shards=3)
    with object_servers.http(root) as (address, server):
        open_checkpoint(address / "sharded")
        looked = Counter(path for _, path, asked, _ in server.asked if asked == "bytes=0-0")
    assert looked["/sharded/model-00001-of-00003.safetensors"] == looked["/sharded/tokenizer.json"] == 1


def test_a_file_of_an_unusual_name_is_a_model(root: Path) -> None:
    write_checkpoint(root / "one").joinpath("model.safetensors").rename(root / "one" / "odd.safetensors")
    for file in write_checkpoint(root / "set", shards=3).glob("model-*"):
        file.rename(root / "set" / file.name.replace("model", "odd"))
    with object_servers.http(root) as (address, _):
        found = open_checkpoint(address / "one" / "odd.safetensors")
        assert [entry.name for entry in found.files] == ["odd.safetensors"]
        assert "config.json" in found.aux
        found = open_checkpoint(address / "set" / "odd-00002-of-00003.safetensors")
        assert [entry.name for entry in found.files] == [f"odd-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def test_what_an_index_names_outside_the_folder_is_not_looked_for(
    root: Path, served: tuple[Address, type[Files]]
) -> None:
    address, server = served
    (root / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x", "b": "/etc/y"}}))
    with pytest.raises(BadCheckpoint, match="leaves the checkpoint's folder"):
        open_checkpoint(address)
    assert not [path for _, path, _, _ in server.asked if "etc" in path or "x" in path.split("/")]


def test_where_no_model_is_the_names_are_said(served: tuple[Address, type[Files]]) -> None:
    address, _ = served
    said = open_store(address / "no").absence()
    assert said is not None
    assert "config.json" in said
    with pytest.raises(BadSpec, match="can be read, not written"):
        destination_at(address, "0" * 12)


def test_a_server_that_answers_every_path_with_a_page_has_no_such_files(served: tuple[Address, type[Files]]) -> None:
    address, server = served
    server.spoil = "page"
    assert [entry.name for entry in open_store(address).list()] == ["model.safetensors"]


def test_ranges_are_read_side_by_side_and_in_order(served: tuple[Address, type[Files]]) -> None:
    store = open_store(served[0])
    [entry] = store.list()
    ranges = [(at, at + 70_000) for at in range(0, 4_000_000, 70_000)]
    assert [bytes(part) for part in store.read_ranges(entry, ranges)] == [DATA[start:stop] for start, stop in ranges]


def test_a_body_that_breaks_goes_on_where_it_ended(served: tuple[Address, type[Files]]) -> None:
    address, server = served
    store = open_store(address)
    [entry] = store.list()
    patient()
    server.spared = 1 << 20
    for spoil in ("cut", "short"):
        server.spoil = spoil
        server.asked.clear()
        assert store.read(entry, 0, len(DATA)) == DATA
        starts = [int(asked.removeprefix("bytes=").partition("-")[0]) for _, _, asked, _ in server.asked if asked]
        assert starts == sorted(starts)
        assert starts[1] > 0


def test_a_busy_server_is_asked_again_and_less(served: tuple[Address, type[Files]]) -> None:
    address, server = served
    store = open_store(address)
    [entry] = store.list()
    patient()
    server.fails[:] = [(429, ""), (500, "InternalError"), (503, "SlowDown")]
    assert store.read(entry, 0, 10) == DATA[:10]
    assert client_of(address)[0].traffic.limit < 8


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        ("range", StorageError, "another range than it was asked for"),
        ("tag", BadCheckpoint, r"model\.safetensors: it changed while it was read"),
        ("long", StorageError, "sent more than the 1000 bytes"),
        ("cut", StorageError, "the connection was cut; tried 1 times"),
        ("short", StorageError, "the body ended 499 bytes early; tried 1 times"),
    ],
)
def test_an_answer_that_is_wrong_is_refused_by_name(
    spoil: str, error: type[Exception], message: str, served: tuple[Address, type[Files]]
) -> None:
    address, server = served
    store = open_store(address)
    [entry] = store.list()
    server.spoil = spoil
    with pytest.raises(error, match=message) as raised:
        store.read(entry, 0, 1000)
    assert "model.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"who you are is not known \(401.*USER:PASSWORD@HOST"),
        (403, r"you may not do this \(403"),
        (404, "it is not there"),
        (418, "answered 418.*not expected"),
        (429, "answered 429.*; tried 1 times"),
        (503, "answered 503.*run the same command again later"),
    ],
)
def test_each_refusal_is_one_clear_line(status: int, message: str, served: tuple[Address, type[Files]]) -> None:
    address, server = served
    store = open_store(address)
    [entry] = store.list()
    server.fails[:] = [(status, "")] * 5
    with pytest.raises(StorageError, match=message) as raised:
        store.read(entry, 0, 10)
    assert "\n" not in str(raised.value)


def test_hosts_that_do_not_answer() -> None:
    for where, said in (("http://127.0.0.1:1/m", "refuses connections"), ("http://no.such.invalid/m", "not resolved")):
        with pytest.raises(StorageError, match=said):
            open_store(where).find("config.json")


def test_secrets_of_an_address_are_sent_and_never_shown(served: tuple[Address, type[Files]]) -> None:
    address, server = served
    secret = Address.of(f"{address.text.replace('//', '//me:pass%20word@')}?sig=SIGNATURE")
    store = open_store(secret)
    entry = store.find("model.safetensors")
    assert entry is not None
    assert store.read(entry, 0, 5) == DATA[:5]
    assert server.asked[-1][1].endswith("model.safetensors?sig=SIGNATURE")
    assert server.asked[-1][3] == "Basic bWU6cGFzcyB3b3Jk"
    server.fails[:] = [(401, "")]
    with pytest.raises(StorageError) as raised:
        store.read(entry, 0, 5)
    assert not [word for word in ("pass%20", "pass word", "SIGNATURE", "bWU6") if word in str(raised.value)]


def test_names_may_have_any_characters(root: Path, served: tuple[Address, type[Files]]) -> None:
    (root / "m" / "ä b").mkdir()
    (root / "m" / "ä b" / "tokenizer.json").write_bytes(b"12")
    address = Address(f"{served[0].text}/%C3%A4%20b")
    assert [entry.name for entry in open_store(address).list()] == ["tokenizer.json"]


def test_an_empty_file(root: Path, served: tuple[Address, type[Files]]) -> None:
    (root / "m" / "LICENSE").write_bytes(b"")
    store = open_store(served[0])
    entry = store.find("LICENSE")
    assert entry is not None
    assert store.read(entry, 0, 0) == b""


def test_a_server_without_ranges_needs_a_cache(tmp_path: Path, served: tuple[Address, type[Files]]) -> None:
    address, server = served
    server.has_ranges = False
    with pytest.raises(BadSpec, match=r"sends no ranges.*store\.cache=FOLDER"):
        open_store(address).find("model.safetensors")
    use(replace(StoreSettings(), cache=str(tmp_path / "cache")))
    store = open_store(address)
    [entry] = store.list()
    server.asked.clear()
    assert store.read(entry, 100, 200) == DATA[100:200]
    assert open_store(address).read(entry, 0, 9) == DATA[:9]
    assert [method for method, _, asked, _ in server.asked if asked is None] == ["GET"]
    assert len(whole_files(tmp_path / "cache")) == 1


def whole_files(cache: Path) -> list[Path]:
    return list((cache / "ranges" / "whole").glob("[0-9a-f]*[0-9a-f]"))


@pytest.mark.parametrize("place", [0, 3_000_000, -40, -1, None])
def test_a_whole_file_that_is_damaged_is_fetched_again(
    root: Path, tmp_path: Path, served: tuple[Address, type[Files]], place: int | None
) -> None:
    address, server = served
    server.has_ranges = False
    data = DATA[:3_500_000]
    (root / "m" / "large.bin").write_bytes(data)
    use(replace(StoreSettings(), cache=str(tmp_path / "cache")))
    store = open_store(address)
    entry = store.find("large.bin")
    assert entry is not None
    for start, stop in ((0, len(data)), (5, 5), (1 << 20, 2 << 20), (1_048_575, 3_400_001), (3_499_990, 3_500_000)):
        assert store.read(entry, start, stop) == data[start:stop]
    [kept] = whole_files(tmp_path / "cache")
    raw = bytearray(kept.read_bytes())
    raw[place or 0] ^= 1
    kept.write_bytes(raw[:-16] if place is None else raw)
    for ranges in set(kept.parents[1].iterdir()) - {kept.parent}:
        shutil.rmtree(ranges) if ranges.is_dir() else ranges.unlink()  # they are kept as well
    server.asked.clear()
    assert store.read(entry, 0, len(data)) == data
    assert [method for method, _, asked, _ in server.asked if asked is None] == ["GET"]
    assert store.read(entry, 7, 9) == data[7:9]


def test_whole_files_count_for_the_limit_of_the_cache(
    root: Path, tmp_path: Path, served: tuple[Address, type[Files]]
) -> None:
    address, server = served
    server.has_ranges = False
    for number in range(4):
        (root / "m" / f"{number}.bin").write_bytes(DATA)
    use(replace(StoreSettings(), cache=str(tmp_path / "cache"), cache_gb=3 * len(DATA) / 1e9))
    for number in (0, 1, 0, 2, 3):
        store = open_store(address)
        entry = store.find(f"{number}.bin")
        assert entry is not None
        at = len(server.asked) * 10  # a range that was not kept
        assert store.read(entry, at, at + 5) == DATA[at : at + 5]
    assert len(whole_files(tmp_path / "cache")) == 2
    server.asked.clear()
    store = open_store(address)
    entry = store.find("3.bin")
    assert entry is not None
    assert store.read(entry, 0, 5) == DATA[:5]
    assert [method for method, _, asked, _ in server.asked if asked is None] == ["GET"]  # to look it up alone


def test_without_tags_the_size_tells_versions_apart(
    root: Path, served: tuple[Address, type[Files]], caplog: pytest.LogCaptureFixture
) -> None:
    address, server = served
    server.has_tags = False
    store = open_store(address)
    [entry] = store.list()
    assert "no versions of files" in caplog.text
    assert store.read(entry, 0, 4) == DATA[:4]
    (root / "m" / "model.safetensors").write_bytes(DATA[:-1])
    with pytest.raises(BadCheckpoint, match="it changed while it was read"):
        store.read(entry, 0, 4)
