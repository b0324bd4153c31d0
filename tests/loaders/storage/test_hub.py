"""Repositories of the Hub as stores, against the test-suite's own Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders.errors import BadCheckpoint, BadSpec, StorageError
from loaders.storage import open_source, open_store
from loaders.storage.address import Address
from loaders.storage.base import PinnedFiles
from loaders.storage.settings import StoreSettings, current, use
from tests.hub.server import Fault, Hub

DATA = os.urandom(300_000)
REPO = "org/name"


@pytest.fixture(autouse=True)
def impatient() -> Callable[[], None]:
    before = current()
    use(StoreSettings(patience_s=5))
    yield
    use(before)


@pytest.fixture
def filled(hub: Hub) -> Hub:
    hub.put(REPO, {"a.bin": DATA, "b/c.json": b"{}", "README.md": b"hello"})
    return hub


def test_files_are_listed_and_read(filled: Hub) -> None:
    store = open_store(f"hf://{REPO}")
    assert store.absence() is None
    assert [(entry.name, entry.size) for entry in store.list()] == [
        ("README.md", 5), ("a.bin", len(DATA)), ("b/c.json", 2)
    ]  # fmt: skip
    entry = store.list()[1]
    ranges = [(0, 5), (100_000, 200_001), (0, len(DATA)), (7, 7)]
    assert [bytes(part) for part in store.read_ranges(entry, ranges)] == [DATA[a:b] for a, b in ranges]
    assert bytes(store.read(store.list()[0], 0, 5)) == b"hello"
    assert not store.is_local
    assert store.local_path("a.bin") is None


def test_a_folder_and_a_file_of_a_repository_are_stores(filled: Hub) -> None:
    assert [entry.name for entry in open_store(f"hf://{REPO}/b").list()] == ["c.json"]
    alone = open_source(f"hf://{REPO}/a.bin")
    assert [entry.name for entry in alone.list()] == ["README.md", "a.bin"]
    assert bytes(PinnedFiles(alone).read("a.bin", 3, 9)) == DATA[3:9]
    assert open_store(f"hf://{REPO}/no").absence() == "no file or folder 'no' in it"


def test_a_branch_that_moves_does_no_harm(filled: Hub) -> None:
    store = open_store(f"hf://{REPO}")
    address, entry = store.address, store.list()[1]
    assert str(address) == f"hf://{REPO}@{filled.get(REPO).branches['main']}"
    filled.put(REPO, {"a.bin": DATA[::-1]})
    assert bytes(store.read(entry, 0, 10)) == DATA[:10]
    assert bytes(open_store(address).read(entry, 10, 20)) == DATA[10:20]
    assert bytes(PinnedFiles(open_store(f"hf://{REPO}")).read("a.bin", 0, 10)) == DATA[::-1][:10]


def test_revisions(filled: Hub) -> None:
    filled.put(REPO, {"a.bin": b"\0other"}, branch="feature/x")
    assert open_source(f"hf://{REPO}@feature%2Fx/a.bin").list()[1].size == 6
    assert open_store(f"hf://{REPO}@main").list()[1].size == len(DATA)
    assert "no such branch, tag or commit" in str(open_store(f"hf://{REPO}@nope").absence())
    assert open_store(f"hf://{REPO}@nope").list() == ()


def test_long_listings_come_in_pages(hub: Hub) -> None:
    names = [f"f{number:02d}.json" for number in range(25)]
    hub.put(REPO, dict.fromkeys(names, b"{}"))
    hub.page = 4
    assert [entry.name for entry in open_store(f"hf://{REPO}").list()] == names
    assert hub.requests("cursor=") == 6


def test_a_listings_next_page_is_asked_of_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put(REPO, {"a.json": b"{}"})
    hub.tokens["hf_secret"] = "org"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def elsewhere(headers: dict[str, str], data: bytes) -> bytes:
        headers["Link"] = f'<@{hub.cdn.removeprefix("http://")}/objects/x>; rel="next"'
        return data

    hub.faults.append(Fault("/tree/", change=elsewhere))
    with pytest.raises(StorageError, match="the Hub answers 404"):
        open_store(f"hf://{REPO}").list()
    assert hub.leaked == []


def test_a_redirect_is_followed_once_and_again_when_it_expires(filled: Hub) -> None:
    store = open_store(f"hf://{REPO}")
    entry = store.list()[1]
    for at in range(5):
        assert bytes(store.read(entry, at, at + 9)) == DATA[at : at + 9]
    assert filled.requests("resolve") == 1
    filled.expire()
    assert bytes(store.read(entry, 0, 9)) == DATA[:9]
    assert filled.requests("resolve") == 2


def test_the_token_goes_to_the_hub_alone(filled: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.tokens["hf_secret"] = "org"
    filled.get(REPO).is_private = True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert bytes(PinnedFiles(open_store(f"hf://{REPO}")).read("a.bin", 0, 9)) == DATA[:9]
    assert filled.leaked == []


def test_the_token_may_be_in_its_file(filled: Hub) -> None:
    from huggingface_hub import constants

    filled.tokens["hf_kept"] = "org"
    filled.get(REPO).is_private = True
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_kept")
    assert open_store(f"hf://{REPO}").absence() is None


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (
            None,
            r"no such repository, or a private one \(then log in \(hf auth login\), or set HF_TOKEN\): check the name",
        ),
        ("hf_other", "no such repository, or a private one that this account may not read"),
    ],
)
def test_private_and_missing_repositories(
    token: str | None, said: str, filled: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    filled.get(REPO).is_private = True
    filled.tokens["hf_other"] = "other"
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for repo in (REPO, "org/missing"):
        store = open_store(f"hf://{repo}")
        assert re.search(said, str(store.absence()))
        assert store.find("a.bin") is None
        assert not store.is_taken()


@pytest.mark.parametrize("endpoint", ["localhost:8080", "http://localhost:port", "https://", "hub.example.org"])
def test_an_endpoint_that_is_no_url_is_refused_at_once(
    endpoint: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(BadSpec, match="HF_ENDPOINT: expected a URL"):
        open_store(f"hf://{REPO}").absence()


def test_a_wrong_token_is_refused_in_one_line(filled: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BadSpec, match=r"the Hub refuses the token.*log in") as caught:
        open_store(f"hf://{REPO}").absence()
    assert "hf_wrong" not in str(caught.value)


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_gated_repository_is_explained(token: str | None, filled: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.get(REPO).gated_for = frozenset({"friend"})
    filled.tokens |= {"hf_other": "other", "hf_friend": "friend"}
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadSpec, match=f"a gated repository: ask for access at {filled.url}/{REPO}; "):
        PinnedFiles(open_store(f"hf://{REPO}")).read("a.bin", 0, 9)
    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    assert bytes(PinnedFiles(open_store(f"hf://{REPO}")).read("a.bin", 0, 9)) == DATA[:9]


def test_a_body_that_is_cut_goes_on_in_its_middle(filled: Hub) -> None:
    store = open_store(f"hf://{REPO}")
    entry = store.list()[1]
    filled.faults += [Fault("/objects/", cut_at=150_000), Fault("/objects/", cut_at=10)]
    assert bytes(store.read(entry, 0, len(DATA))) == DATA
    assert filled.gets[f"{REPO}/a.bin"] == 3


@pytest.mark.parametrize(
    "fault",
    [
        Fault("resolve", status=429, headers={"Retry-After": "0"}),
        Fault("/objects/", status=503),
        Fault("tree", status=500),
        Fault("revision", status=502),
    ],
    ids=lambda fault: str(fault.status),
)
def test_what_passes_is_tried_again(fault: Fault, filled: Hub) -> None:
    filled.faults.append(fault)
    assert bytes(PinnedFiles(open_store(f"hf://{REPO}")).read("a.bin", 0, 9)) == DATA[:9]
    assert fault.times == 0


def test_a_server_that_stays_busy_is_an_error_at_last(filled: Hub) -> None:
    store = open_store(f"hf://{REPO}")
    entry = store.list()[1]
    filled.faults.append(Fault("resolve", times=1000, status=503))
    use(StoreSettings(patience_s=0.2))
    with pytest.raises(StorageError, match=r"a\.bin: the Hub answers 503; tried .* run the same command again"):
        store.read(entry, 0, 9)


@pytest.mark.parametrize(
    ("where", "header", "value", "error"),
    [
        ("resolve", "X-Linked-ETag", '"0000"', "it changed while it was read: ETag"),
        ("resolve", "X-Linked-Size", "7", "it changed while it was read: 7 bytes"),
        ("resolve", "X-Repo-Commit", "0" * 40, "it changed while it was read: commit"),
        ("resolve", "Location", "ftp://elsewhere/x", "redirects to no address"),
        ("resolve", "Location", "http://[", "redirects to no address"),
        ("/objects/", "Content-Range", "bytes 0-8/9", "it changed while it was read: 9 bytes"),
        ("/objects/", "Content-Range", f"bytes 1-9/{len(DATA)}", "the server sends bytes 1-9"),
        ("/objects/", "Content-Range", "nonsense", "gives no ranges"),
    ],
)
def test_lies_of_servers_are_found(where: str, header: str, value: str, error: str, filled: Hub) -> None:
    store = open_store(f"hf://{REPO}")
    entry = store.list()[1]

    def lie(headers: dict[str, str], data: bytes) -> bytes:
        headers[header] = value
        return data

    filled.faults.append(Fault(where, times=9, change=lie))
    with pytest.raises((BadCheckpoint, StorageError), match=error):
        store.read(entry, 0, 9)


def test_more_bytes_than_asked_for_are_an_error(filled: Hub) -> None:
    store = open_store(f"hf://{REPO}")

    def more(headers: dict[str, str], data: bytes) -> bytes:
        headers["Content-Length"] = str(len(data) + 5)
        return data + b"extra"

    filled.faults.append(Fault("/objects/", change=more))
    with pytest.raises(StorageError, match=r"a\.bin: the server sends more bytes than were asked for"):
        store.read(store.list()[1], 0, 9)


@pytest.mark.parametrize("name", ["../up.json", "/etc/passwd", "a/../../b", "a//b", ""])
def test_listings_that_lead_out_are_refused(name: str, hub: Hub) -> None:
    hub.put(REPO, {name: b"{}"})
    with pytest.raises(BadCheckpoint, match="do not trust it"):
        open_store(f"hf://{REPO}").list()


@pytest.mark.parametrize("text", ["hf://name", "hf://a/b/../c", "hf://a--b/c", "hf://a/b@x//y"])
def test_addresses_that_are_none_are_refused(text: str, hub: Hub) -> None:
    with pytest.raises(BadSpec, match="expected hf://OWNER/NAME|is no path"):
        open_store(text)


def test_the_cache_is_used_for_what_it_has(filled: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    huggingface_hub.hf_hub_download(REPO, "a.bin", endpoint=filled.url, cache_dir=constants.HF_HUB_CACHE)
    before = filled.gets[f"{REPO}/a.bin"]
    part = open_store(f"hf://{REPO}")
    assert not part.is_local  # README.md is not there
    assert bytes(PinnedFiles(part).read("a.bin", 5, 50)) == DATA[5:50]
    assert filled.gets[f"{REPO}/a.bin"] == before

    huggingface_hub.snapshot_download(REPO, endpoint=filled.url, cache_dir=constants.HF_HUB_CACHE)
    whole = open_store(f"hf://{REPO}")
    assert whole.is_local
    path = whole.local_path("a.bin")
    assert path is not None
    assert path.read_bytes() == DATA
    assert whole.list() == part.list()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(filled.asked)
    offline = open_store(f"hf://{REPO}")
    assert offline.list() == part.list()
    assert offline.is_local
    assert bytes(PinnedFiles(offline).read("b/c.json", 0, 2)) == b"{}"
    assert "HF_HUB_OFFLINE is set" in str(open_store("hf://org/other").absence())
    assert len(filled.asked) == asked


def test_a_damaged_cache_is_not_used(filled: Hub) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    path = Path(huggingface_hub.hf_hub_download(REPO, "a.bin", endpoint=filled.url, cache_dir=constants.HF_HUB_CACHE))
    path.resolve().write_bytes(b"cut")
    assert bytes(PinnedFiles(open_store(f"hf://{REPO}")).read("a.bin", 5, 50)) == DATA[5:50]


def test_addresses_of_the_hub() -> None:
    address = Address.of("hf://org/name@main")
    assert address.parent == address
    assert address.parents == ()
    assert (address / "b").parent == address


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("/m/llama", "llama"),
        ("/m/llama/model.safetensors", "llama"),
        ("/m/llama/model-00002-of-00003.safetensors", "llama"),
        ("/m/llama/pytorch_model.bin", "llama"),
        ("/m/llama/Llama-8B-Q8_0.gguf", "Llama-8B-Q8_0"),
        ("/m/llama/Llama-8B-Q8_0-00001-of-00002.gguf", "Llama-8B-Q8_0"),
        (f"/c/hub/models--org--name-1.5/snapshots/{'0a' * 20}", "name-1.5"),
        (f"/c/hub/models--org--name-1.5/snapshots/{'0a' * 20}/model.safetensors", "name-1.5"),
        (f"/c/hub/models--gpt2/snapshots/{'0a' * 20}", "gpt2"),
        ("/c/models--org--name/snapshots/mine", "mine"),
        ("hf://org/name@main", "name"),
        (f"hf://org/name@{'0a' * 20}/model.safetensors", "name"),
        ("s3://bucket/models/name", "name"),
        ("s3://bucket/models/name/model.safetensors", "name"),
        ("/model", "model"),
    ],
)
def test_a_model_has_its_name_and_not_that_of_its_file_or_commit(text: str, title: str) -> None:
    assert Address.of(text).title == title
