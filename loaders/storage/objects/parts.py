"""Uploads in parts, which obstore makes only as a whole: botocore for S3, azure-storage-blob for Azure's blocks.

A part's checksum (MD5) goes with it, so the store refuses what arrived otherwise, and its answer shows that it looked.
Until an upload is completed nobody sees it, and an S3 keeps the parts, for money, until it is aborted.
"""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, Protocol

from loaders.storage.objects.answers import Denied, raise_for
from loaders.storage.objects.services import aws_client, azure_account
from loaders.storage.patience import Passing
from loaders.storage.settings import StoreSettings

MOST_PARTS = 10_000  # of an upload to S3
SMALLEST_PART = 5 << 20  # bytes of every part but the last
LARGEST_PART = 5 << 30


@dataclass(frozen=True, slots=True)
class Part:
    """A part that was uploaded: its number from 1 on, its name there, and whether the store confirmed its bytes."""

    number: int
    tag: str
    is_confirmed: bool


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload under way: its key, the store's name for it, the bytes of its parts, and when it was begun."""

    key: str
    id: str
    size: int
    began: datetime


class Parts(Protocol):
    """Uploads in parts to one bucket. All methods raise as `answers.answers` does."""

    def begin(self, key: str) -> str:
        """Begin an upload and return its name."""
        ...

    def put(self, key: str, upload: str, number: int, data: bytes, digest: bytes) -> Part:
        """Upload a part, of which `digest` is the MD5."""
        ...

    def copy(self, key: str, upload: str, number: int, source: str, start: int, stop: int) -> Part:
        """Make a part of bytes [start, stop) of another object, which the store copies by itself."""
        ...

    def complete(self, key: str, upload: str, parts: Sequence[Part]) -> None:
        """Make the object of its parts, in the order of their numbers."""
        ...

    def abort(self, key: str, upload: str) -> None: ...

    def left(self, prefix: str) -> list[Upload]:
        """List the uploads under way to keys that begin with PREFIX/."""
        ...


def md5(data: bytes) -> bytes:
    """Return the MD5 of bytes: what stores check on arrival. It detects accidents, and is no protection."""
    return hashlib.md5(data, usedforsecurity=False).digest()


class S3Parts:
    """`Parts` of S3 and of services that speak its language."""

    def __init__(self, bucket: str, settings: StoreSettings) -> None:
        self._bucket = bucket
        self._settings = settings
        self._client = aws_client(bucket, settings)

    def begin(self, key: str) -> str:
        return str(self._ask(key, "create_multipart_upload")["UploadId"])

    def put(self, key: str, upload: str, number: int, data: bytes, digest: bytes) -> Part:
        answer = self._ask(
            key, "upload_part", UploadId=upload, PartNumber=number, Body=data,
            ContentMD5=base64.b64encode(digest).decode(),
        )  # fmt: skip
        # The tag of an encrypted part is no MD5; the service that encrypts it is AWS' own, which checks ContentMD5.
        is_encrypted = any(name in answer for name in ("SSEKMSKeyId", "SSECustomerAlgorithm"))
        tag = str(answer["ETag"])
        return Part(number, tag, is_encrypted or tag.strip('"').lower() == digest.hex())

    def copy(self, key: str, upload: str, number: int, source: str, start: int, stop: int) -> Part:
        answer = self._ask(
            key, "upload_part_copy", UploadId=upload, PartNumber=number,
            CopySource={"Bucket": self._bucket, "Key": source}, CopySourceRange=f"bytes={start}-{stop - 1}",
        )  # fmt: skip
        return Part(number, str(answer["CopyPartResult"]["ETag"]), is_confirmed=False)

    def complete(self, key: str, upload: str, parts: Sequence[Part]) -> None:
        rows = [{"PartNumber": part.number, "ETag": part.tag} for part in sorted(parts, key=lambda part: part.number)]
        self._ask(key, "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": rows})

    def abort(self, key: str, upload: str) -> None:
        self._ask(key, "abort_multipart_upload", UploadId=upload)

    def left(self, prefix: str) -> list[Upload]:
        with aws_answers(f"listing uploads of s3://{self._bucket}/{prefix}", self._settings):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=f"{prefix}/" if prefix else ""
            )
            rows = [row for page in pages for row in page.get("Uploads", ())]
            return [
                Upload(row["Key"], row["UploadId"], self._size(row["Key"], row["UploadId"]), row["Initiated"])
                for row in rows
            ]

    def _size(self, key: str, upload: str) -> int:
        pages = self._client.get_paginator("list_parts").paginate(Bucket=self._bucket, Key=key, UploadId=upload)
        return sum(part["Size"] for page in pages for part in page.get("Parts", ()))

    def _ask(self, key: str, operation: str, **arguments: Any) -> Any:
        with aws_answers(f"uploading s3://{self._bucket}/{key}", self._settings):
            return getattr(self._client, operation)(Bucket=self._bucket, Key=key, **arguments)


@contextmanager
def aws_answers(what: str, settings: StoreSettings) -> Iterator[None]:
    """Turn botocore's exceptions into those of `answers`."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectTimeoutError,
        CredentialRetrievalError,
        HTTPClientError,
        NoCredentialsError,
        ReadTimeoutError,
    )  # fmt: skip

    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(error.response.get("Error", {}).get("Code", ""))
        retry_after = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after")
        raise_for(what, status, "" if code.isdigit() else code, code, settings.timeout_s, retry_after)
    except (NoCredentialsError, CredentialRetrievalError) as error:
        raise Denied(401, "no credentials") from error
    except (ConnectTimeoutError, ReadTimeoutError) as error:
        raise Passing(f"no byte came within {settings.timeout_s:g} s", is_busy=True) from error
    except HTTPClientError as error:
        raise Passing(f"the connection failed ({type(error).__name__})") from error
    except BotoCoreError as error:
        raise_for(what, None, "", f"{type(error).__name__}", settings.timeout_s)


class AzureParts:
    """`Parts` of Azure: blocks that are named by the upload and their number, until a list of them is committed.

    There is nothing to abort: what is not committed vanishes after a week.
    """

    def __init__(self, container: str, settings: StoreSettings) -> None:
        from azure.storage.blob import ContainerClient

        account = azure_account(container, settings)
        self._container = container
        self._settings = settings
        self._client = ContainerClient(
            account.endpoint, container, credential=account.key or account.sas, retry_total=0,
            connection_timeout=settings.timeout_s, read_timeout=settings.timeout_s,
        )  # fmt: skip

    def begin(self, key: str) -> str:
        return uuid.uuid4().hex

    def put(self, key: str, upload: str, number: int, data: bytes, digest: bytes) -> Part:
        name = f"{upload}{number:05d}"
        with azure_answers(f"uploading az://{self._container}/{key}", self._settings):
            answer = self._client.get_blob_client(key).stage_block(
                base64.b64encode(name.encode()).decode(), data, length=len(data), validate_content=True
            )
        return Part(number, name, bytes(answer.get("content_md5") or b"") == digest)

    def copy(self, key: str, upload: str, number: int, source: str, start: int, stop: int) -> NoReturn:
        raise NotImplementedError("it takes a signed URL of the source, which who has a token cannot make")

    def complete(self, key: str, upload: str, parts: Sequence[Part]) -> None:
        from azure.storage.blob import BlobBlock

        names = [part.tag for part in sorted(parts, key=lambda part: part.number)]
        blocks = [BlobBlock(base64.b64encode(name.encode()).decode()) for name in names]
        with azure_answers(f"uploading az://{self._container}/{key}", self._settings):
            self._client.get_blob_client(key).commit_block_list(blocks)

    def abort(self, key: str, upload: str) -> None:
        """Do nothing."""

    def left(self, prefix: str) -> list[Upload]:
        return []


@contextmanager
def azure_answers(what: str, settings: StoreSettings) -> Iterator[None]:
    """Turn exceptions of Azure's library into those of `answers`."""
    from azure.core.exceptions import HttpResponseError, ServiceRequestError, ServiceResponseError

    try:
        yield
    except HttpResponseError as error:
        code = str(getattr(error, "error_code", "") or "")
        retry_after = (getattr(error.response, "headers", None) or {}).get("Retry-After")
        raise_for(what, error.status_code, code.rpartition(".")[2], "", settings.timeout_s, retry_after)
    except (ServiceRequestError, ServiceResponseError) as error:
        raise Passing(f"the connection failed ({type(error).__name__})") from error


def has_parts(scheme: str, bucket: str, settings: StoreSettings) -> bool:
    """Whether `parts_of` can upload to a bucket; where it cannot, obstore does, which tells nothing of single parts."""
    if scheme == "az":
        account = azure_account(bucket, settings)
        return bool(account.key or account.sas)
    return scheme == "s3"


def parts_of(scheme: str, bucket: str, settings: StoreSettings) -> Parts:
    """Return how a bucket takes uploads in parts, for one of which `has_parts` holds."""
    return S3Parts(bucket, settings) if scheme == "s3" else AzureParts(bucket, settings)
