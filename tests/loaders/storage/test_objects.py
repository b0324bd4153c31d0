"""Buckets: what is asked of them, and the one line for each thing that can be wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loaders.errors import BadSpec, StorageError
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.folder import A_FILE
from loaders.storage.objects import client as object_client
from loaders.storage.settings import StoreSettings, current, use
from tests import object_servers
from tests.object_servers import Files
from tests.shelf.places import ObjectPlace


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    before = current()
    use(replace(before, patience_s=0.01))
    yield
    use(before)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Files]]:
    """A server that answers S3's requests for objects, and whose failures are chosen."""
    (tmp_path / "bucket" / "m").mkdir(parents=True)
    (tmp_path / "bucket" / "m" / "config.json").write_bytes(b"{}")
    with object_servers.http(tmp_path) as (address, server):
        keys = {"AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "very-secret", "AWS_REGION": "eu-west-1"}
        for name, value in {**keys, "AWS_ENDPOINT_URL": address.text, "AWS_EC2_METADATA_DISABLED": "true"}.items():
            monkeypatch.setenv(name, value)
        yield server


def test_requests_are_signed_unless_they_are_anonymous(fake: type[Files]) -> None:
    assert open_store("s3://bucket/m").find("config.json") is not None
    signature = fake.asked[-1][3] or ""
    assert "Credential=AKIATEST" in signature
    assert "/eu-west-1/s3/" in signature
    use(replace(current(), anonymous=True))
    assert open_store("s3://bucket/m").find("config.json") is not None
    assert fake.asked[-1][3] is None


def test_region_profile_and_endpoint_come_from_settings_and_config_files(
    fake: type[Files], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = current()
    config, keys = tmp_path / "config", tmp_path / "credentials"
    config.write_text(f"[profile other]\nregion = us-west-2\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n")
    keys.write_text("[other]\naws_access_key_id = OTHERKEY\naws_secret_access_key = x\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    use(replace(endpoint, profile="other"))
    assert open_store("s3://bucket/m").find("config.json") is not None
    assert "Credential=OTHERKEY" in (fake.asked[-1][3] or "")
    assert "/us-west-2/s3/" in (fake.asked[-1][3] or "")
    use(replace(endpoint, profile="none-such"))
    with pytest.raises(BadSpec, match="none-such"):
        open_store("s3://bucket/m")


def test_without_credentials_it_is_said_what_to_give(fake: type[Files], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(BadSpec, match=r"no credentials found.*AWS_ACCESS_KEY_ID.*store\.anonymous=true"):
        open_store("s3://bucket/m").find("config.json")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "", r"who you are is not known \(401\)"),
        (403, "InvalidAccessKeyId", r"you may not do this \(403 InvalidAccessKeyId\); give AWS_ACCESS_KEY_ID"),
        (404, "NoSuchKey", "it is not there"),
        (301, "PermanentRedirect", r"in another region; give store\.region"),
        (503, "SlowDown", "answered 503 SlowDown"),
    ],
)
def test_each_refusal_is_one_clear_line(status: int, code: str, message: str, fake: type[Files]) -> None:
    store = open_store("s3://bucket/m")
    entry = store.find("config.json")
    assert entry is not None
    fake.fails[:] = [(status, code)] * 5
    with pytest.raises(StorageError, match=message) as raised:
        store.read(entry, 0, 2)
    assert "\n" not in str(raised.value)
    assert "very-secret" not in str(raised.value)


def test_credentials_that_ended_are_looked_up_again(fake: type[Files], monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("s3://bucket/m")
    entry = store.find("config.json")
    assert entry is not None
    fake.fails[:] = [(400, "ExpiredToken")]
    with pytest.raises(StorageError, match="ExpiredToken"):  # they are only just looked up
        store.read(entry, 0, 2)
    monkeypatch.setattr(object_client, "RENEW_S", 0.0)
    fake.fails[:] = [(400, "ExpiredToken")]
    assert store.read(entry, 0, 2) == b"{}"


def test_a_bucket_that_may_not_be_listed_is_read_by_names(fake: type[Files], caplog: pytest.LogCaptureFixture) -> None:
    fake.refuses_lists = True
    store = open_store("s3://bucket/m")
    assert [entry.name for entry in store.list()] == ["config.json"]
    assert "may not be listed" in caplog.text
    assert store.find("other.json") is None
    with pytest.raises(StorageError, match=r"listing s3://bucket/no: you may not do this \(403 AccessDenied\)"):
        open_store("s3://bucket/no").list()


def test_a_bucket_that_does_not_exist(s3_bucket: Address) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        open_store("s3://no-such-bucket/m").list()


def test_folders_of_consoles_are_no_files(s3_bucket: Address, tmp_path: Path) -> None:
    place = ObjectPlace(s3_bucket / tmp_path.name)
    for name, data in {"m/sub/": b"", "m/sub/a b%20#.bin": b"1", "m/empty": b"", "m/.git/x": b"1"}.items():
        from loaders.storage.objects.services import aws_client

        aws_client("", current()).put_object(Bucket=object_servers.BUCKET, Key=f"{tmp_path.name}/{name}", Body=data)
    store = open_store(place.address / "m")
    assert [entry.name for entry in store.list()] == ["empty", "sub/a b%20#.bin"]
    assert len(store.list(every=True)) == 3
    file = open_store(place.address / "m/empty")
    assert file.absence() == A_FILE


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://KEY:SECRET@bucket/m", "user and password do not belong"),
        ("s3://bucket/m?x=SECRET", r"expected s3://BUCKET/PATH, without \? and #"),
        ("s3:///m", "expected s3://BUCKET"),
        ("http:///m", "expected http://HOST/PATH"),
    ],
)
def test_addresses_that_are_none(address: str, message: str) -> None:
    with pytest.raises(BadSpec, match=message) as raised:
        open_store(address)
    assert "SECRET" not in str(raised.value)


def test_azure_needs_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_USE_EMULATOR", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadSpec, match="the account is not known; give AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/m")


def test_azure_s_own_ways_to_name_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    from loaders.storage.objects.services import azure_account

    monkeypatch.delenv("AZURE_STORAGE_USE_EMULATOR", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=me;AccountKey=a2V5;EndpointSuffix=example.net")
    found = azure_account("c", StoreSettings())
    assert (found.name, found.endpoint, found.key) == ("me", "https://me.blob.example.net", "a2V5")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "UseDevelopmentStorage=true")
    assert azure_account("c", StoreSettings()).name == "devstoreaccount1"
