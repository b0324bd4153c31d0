"""How the services of objects are reached: endpoint, region and credentials, from where each service's own tools look.

Settings go before the environment. A store keeps no credentials; they are looked up again whenever it is opened.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from loaders.errors import BadSpec
from loaders.missing import needed_for
from loaders.storage.address import Address
from loaders.storage.settings import StoreSettings

# Environment variables that a service's client depends on begin so.
VARIABLES = ("AWS_", "GOOGLE_", "AZURE_", "AZURITE_", "STORAGE_EMULATOR_HOST", "HOME", "CLOUDSDK_")
# Keys without an end of their own are looked up again after this time, as a file with them may have been replaced.
CREDENTIALS_FOR = timedelta(minutes=15)
AWS_HOST = ".amazonaws.com"


class Open(Protocol):
    def __call__(self, patience_s: float | None = None) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One bucket, container or host: `open` makes obstore's client of it, with the credentials of the moment.

    The client tries nothing again, unless `open` is given the seconds over which it should (patience_s).

    `host` is for counting requests, `advice` for the message when credentials are refused.
    """

    open: Open
    host: str
    advice: str
    has_lists: bool = True


def place_of(address: Address) -> tuple[str, str]:
    """Return an address's bucket (of HTTP: the URL of the server, with its query) and key, without slashes around it.

    Raises:
        BadSpec: the address names no bucket, or holds what does not belong there.
    """
    try:
        parts = urlsplit(address.text)
        segments = unquote(parts.path).strip("/").split("/")
    except ValueError as error:
        raise BadSpec(f"{address}: expected {address.scheme}://HOST/PATH ({error})") from None
    # Stores' libraries take none of these for a key, and what servers make of them differs.
    if len(segments) > 1 and any(segment in ("", ".", "..") for segment in segments):
        raise BadSpec(f"{address}: expected a path without empty parts, . and .., between slashes")
    if address.scheme in ("http", "https"):
        if not parts.hostname:
            raise BadSpec(f"{address}: expected {address.scheme}://HOST/PATH")
        return urlunsplit(parts._replace(path="", fragment="")), unquote(parts.path).strip("/")
    if "@" in parts.netloc:
        raise BadSpec(f"{address}: user and password do not belong into an address; the environment has them")
    if not parts.netloc or parts.query or parts.fragment:
        raise BadSpec(f"{address}: expected {address.scheme}://BUCKET/PATH, without ? and #")
    return parts.netloc, parts.path.strip("/")


def service_of(scheme: str, bucket: str, settings: StoreSettings) -> Service:
    """Return the service of a bucket.

    Raises:
        BadSpec: a library is missing, or the environment does not say how the service is reached.
    """
    with libraries(scheme):
        return SERVICES[scheme](bucket, settings)


@contextmanager
def libraries(scheme: str) -> Iterator[None]:
    """Say what to install if a library is missing that the block imports."""
    with needed_for(f"{scheme}://"):
        yield


def _options(settings: StoreSettings, url: str | None, patience_s: float | None) -> dict[str, Any]:
    """Return obstore's options. Its own retries are off unless they get seconds: `patiently` paces all requests."""
    timeout = f"{max(1, int(settings.timeout_s * 1000))}ms"
    client: dict[str, Any] = {"connect_timeout": timeout, "read_timeout": timeout, "timeout": "1h"}
    if url is not None and url.startswith("http://"):
        client |= {"allow_http": True}
    retries: dict[str, Any] = {"max_retries": 0, "retry_timeout": timedelta(hours=1)}
    if patience_s is not None:
        retries = {"max_retries": 1000, "retry_timeout": timedelta(seconds=patience_s)}
    return {"client_options": client, "retry_config": retries}


# --- S3


def aws_client(bucket: str, settings: StoreSettings, *, region: str | None = None) -> Any:
    """Return botocore's client, which finds endpoint, region and profile as AWS' own tools do.

    Raises:
        BadSpec: the profile is unknown, or the configuration is not valid.
    """
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        **({"signature_version": UNSIGNED} if settings.anonymous else {}),
        retries={"total_max_attempts": 1},
        connect_timeout=settings.timeout_s,
        read_timeout=settings.timeout_s,
        max_pool_connections=settings.at_once,
        # Not every service knows the checksums that botocore adds by itself; we send an MD5, which all of them check.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"},
    )
    try:
        session = botocore.session.Session(profile=settings.profile)
        # botocore alone does not read AWS_REGION, which all other tools of AWS do.
        region = (
            region
            or settings.region
            or os.environ.get("AWS_REGION")
            or session.get_config_variable("region")
            or "us-east-1"
        )
        return session.create_client("s3", region_name=region, endpoint_url=settings.endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise BadSpec(f"s3://{bucket}: {error}") from None


def _s3(bucket: str, settings: StoreSettings) -> Service:
    from obstore.store import S3Store

    first = aws_client(bucket, settings)
    endpoint = str(first.meta.endpoint_url)
    is_aws = (urlsplit(endpoint).hostname or "").endswith(AWS_HOST)
    region = (settings.region or _region(first, bucket)) if is_aws else None
    if region is not None and region != first.meta.region_name:
        first = aws_client(bucket, settings, region=region)
        endpoint = str(first.meta.endpoint_url)

    def open_it(patience_s: float | None = None) -> Any:
        signed: dict[str, Any] = {"skip_signature": True}
        if not settings.anonymous:
            signed = {"credential_provider": _Keys(bucket, settings)}
        where: dict[str, Any] = {"region": region or first.meta.region_name, "endpoint": endpoint}
        return S3Store(bucket, **where, **signed, **_options(settings, endpoint, patience_s))

    advice = (
        "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or store.profile, of somebody who may use it;"
        " store.anonymous=true reads public buckets"
    )
    return Service(open=open_it, host=urlsplit(endpoint).netloc, advice=advice)


def _region(client: Any, bucket: str) -> str | None:
    """Ask AWS for a bucket's region, which it tells even those whom it refuses the bucket."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    # Whatever is wrong will be said when the bucket is used.
    except BotoCoreError:
        return None
    found = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
    return None if found is None else str(found)


class _Keys:
    """AWS' credentials by botocore: environment, profiles, single sign-on, roles and instances."""

    def __init__(self, bucket: str, settings: StoreSettings) -> None:
        import botocore.session

        self._found = botocore.session.Session(profile=settings.profile).get_credentials()
        if self._found is None:
            raise BadSpec(
                f"s3://{bucket}: no credentials found; give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
                " store.profile; store.anonymous=true reads public buckets"
            )

    def __call__(self) -> dict[str, Any]:
        keys = self._found.get_frozen_credentials()
        ends = datetime.now(UTC) + CREDENTIALS_FOR
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": ends,
        }


# --- Google


def _gs(bucket: str, settings: StoreSettings) -> Service:
    from obstore.store import GCSStore

    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator is not None and "://" not in emulator:
        emulator = f"http://{emulator}"
    endpoint = settings.endpoint or os.environ.get("GOOGLE_BASE_URL") or emulator

    def open_it(patience_s: float | None = None) -> Any:
        where: dict[str, Any] = {} if endpoint is None else {"base_url": endpoint}
        # An emulator takes any token, and has nobody to give one.
        signed: dict[str, Any] = {"bearer_token": "emulator"} if endpoint is not None and endpoint == emulator else {}
        signed = {"skip_signature": True} if settings.anonymous else signed
        return GCSStore(bucket, **where, **signed, **_options(settings, endpoint, patience_s))

    advice = (
        "give GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`, as somebody who may use"
        " it; store.anonymous=true reads public buckets"
    )
    return Service(open=open_it, host=urlsplit(endpoint or "https://storage.googleapis.com").netloc, advice=advice)


# --- Azure


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureAccount:
    """An account of Azure's storage and how to sign for it: by a key, or a token of limited rights (SAS)."""

    name: str
    endpoint: str
    key: str | None
    sas: str | None


# Published by Microsoft for its emulator, and no secret: https://learn.microsoft.com/azure/storage/common/storage-use-azurite
EMULATOR = AzureAccount(
    name="devstoreaccount1",
    endpoint="http://127.0.0.1:10000/devstoreaccount1",
    key="Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
    sas=None,
)


def azure_account(container: str, settings: StoreSettings) -> AzureAccount:
    """Find the account as Azure's tools do: by a connection string, or by name and key or token.

    Raises:
        BadSpec: the environment names no account.
    """
    env = os.environ
    text = env.get("AZURE_STORAGE_CONNECTION_STRING", "")
    given = dict(part.partition("=")[::2] for part in text.split(";") if "=" in part)
    is_emulator = given.get("UseDevelopmentStorage") == "true"
    if is_emulator or env.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true"):
        local = settings.endpoint or env.get("AZURITE_BLOB_STORAGE_URL") or EMULATOR.endpoint
        if not local.rstrip("/").endswith(EMULATOR.name):
            local = f"{local.rstrip('/')}/{EMULATOR.name}"
        return AzureAccount(name=EMULATOR.name, endpoint=local, key=EMULATOR.key, sas=None)
    name = given.get("AccountName") or _first(env, "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT")
    if name is None:
        raise BadSpec(
            f"az://{container}: the account is not known; give AZURE_STORAGE_ACCOUNT_NAME, or"
            " AZURE_STORAGE_CONNECTION_STRING"
        )
    suffix = given.get("EndpointSuffix", "core.windows.net")
    endpoint = settings.endpoint or given.get("BlobEndpoint") or env.get("AZURE_STORAGE_ENDPOINT")
    return AzureAccount(
        name=name,
        endpoint=(endpoint or f"https://{name}.blob.{suffix}").rstrip("/"),
        key=given.get("AccountKey")
        or _first(env, "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCESS_KEY"),
        sas=given.get("SharedAccessSignature") or _first(env, "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"),
    )


def _first(env: Mapping[str, str], *names: str) -> str | None:
    return next((env[name] for name in names if env.get(name)), None)


def _az(container: str, settings: StoreSettings) -> Service:
    from obstore.store import AzureStore

    account = azure_account(container, settings)

    def open_it(patience_s: float | None = None) -> Any:
        signed: dict[str, Any] = {}
        if settings.anonymous:
            signed = {"skip_signature": True}
        elif account.key is not None:
            signed = {"account_key": account.key}
        elif account.sas is not None:
            signed = {"sas_key": account.sas}
        where: dict[str, Any] = {"account_name": account.name, "endpoint": account.endpoint}
        return AzureStore(container, **where, **signed, **_options(settings, account.endpoint, patience_s))

    advice = (
        "give AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN of an account that may use it, or AZURE_CLIENT_ID,"
        " AZURE_CLIENT_SECRET and AZURE_TENANT_ID; store.anonymous=true reads public containers"
    )
    return Service(open=open_it, host=urlsplit(account.endpoint).netloc, advice=advice)


# --- HTTP


def _http(url: str, settings: StoreSettings) -> Service:
    from obstore.store import HTTPStore

    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    bare = urlunsplit(parts._replace(netloc=host))

    def open_it(patience_s: float | None = None) -> Any:
        options = _options(settings, bare, patience_s)
        if user:
            word = base64.b64encode(unquote(user).encode()).decode()
            options["client_options"]["default_headers"] = {"authorization": f"Basic {word}"}
        return HTTPStore.from_url(bare, **options)

    advice = "a user and password can stand before the host (https://USER:PASSWORD@HOST/...), a signature behind it"
    return Service(open=open_it, host=host, advice=advice, has_lists=False)


SERVICES: dict[str, Callable[[str, StoreSettings], Service]] = {
    "s3": _s3,
    "gs": _gs,
    "az": _az,
    "http": _http,
    "https": _http,
}
