"""Where a campaign of kills writes outputs, as others see it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tests.making import snapshot
from tests.object_servers import BUCKET


class Target(Protocol):
    """Where outputs are written, as others see it."""

    def address(self, name: str) -> str: ...

    def visible(self, name: str) -> dict[str, bytes]:
        """The files at an output's address, but for what is hidden."""
        ...

    def records(self, name: str) -> dict[str, bytes]:
        """The records of an unpublished output, by unit."""
        ...

    def left(self, name: str) -> list[str]:
        """What is there beside the output."""
        ...


class Bucket:
    """Outputs in a bucket, which is asked directly, and not by the proxy."""

    def __init__(self, endpoint: str) -> None:
        import botocore.session

        self._client = botocore.session.Session().create_client(
            "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        self._client.create_bucket(Bucket=BUCKET)

    def address(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def _names(self, name: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{name}/")
        return (row["Key"].removeprefix(f"{name}/") for page in pages for row in page.get("Contents", ()))

    def _get(self, name: str, file: str) -> bytes:
        return bytes(self._client.get_object(Bucket=BUCKET, Key=f"{name}/{file}")["Body"].read())

    def visible(self, name: str) -> dict[str, bytes]:
        return {file: self._get(name, file) for file in self._names(name) if not file.startswith(".weightmill")}

    def records(self, name: str) -> dict[str, bytes]:
        found = (re.fullmatch(r"\.weightmill/\w+/records/(.+)\.json", file) for file in self._names(name))
        return {match[1]: self._get(name, match[0]) for match in found if match is not None}

    def left(self, name: str) -> list[str]:
        uploads = self._client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
        return [file for file in self._names(name) if file.startswith(".")] + [f"upload of {u['Key']}" for u in uploads]


class Folder:
    """Outputs in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def address(self, name: str) -> str:
        return str(self._folder / name)

    def visible(self, name: str) -> dict[str, bytes]:
        return snapshot(self._folder / name) if (self._folder / name).exists() else {}

    def records(self, name: str) -> dict[str, bytes]:
        return {path.stem: path.read_bytes() for path in self._folder.glob(f".{name}.*/records/*.json")}

    def left(self, name: str) -> list[str]:
        return [path.name for path in self._folder.iterdir() if path.name.startswith(".")]
