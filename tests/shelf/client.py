"""The client of the server: requests, and their errors as those of `Store` and `Destination`."""

from __future__ import annotations

import http.client
import json
from contextlib import closing
from urllib.parse import quote, urlsplit

from loaders.errors import BadCheckpoint, StorageError, TransientIOError
from loaders.storage.address import Address


class Refused(Exception):
    """The condition of a request (If-Match, If-None-Match) does not hold."""


class Client:
    """A client of one server."""

    def __init__(self, address: Address) -> None:
        self._host = urlsplit(address.text).netloc

    def _ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, str | None]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with closing(http.client.HTTPConnection(self._host, timeout=30)) as connection:
                connection.request(method, path, body, given)
                answer = connection.getresponse()
                return answer.status, answer.read(), answer.getheader("ETag")
        except (OSError, http.client.HTTPException) as error:
            raise TransientIOError(f"{method} {self._host}{path}: {error!r}") from error

    def list(self, prefix: str) -> list[tuple[str, int, str]]:
        _, rows, _ = self._ask("GET", f"/?prefix={quote(prefix)}")
        return [(key, size, version) for key, size, version in json.loads(rows)]

    def get(self, key: str, start: int, stop: int, version: str) -> bytes:
        status, data, _ = self._ask("GET", f"/{quote(key)}", Range=f"bytes={start}-{stop - 1}", If_Match=version)
        if status == 412:
            raise BadCheckpoint(f"{key}: it changed while it was read; load it again when nobody writes to it")
        if status == 404:
            raise StorageError(f"reading {key}: it is not there (any more)")
        return data

    def put(self, key: str, data: bytes, **conditions: str) -> str:
        """Write an object and return its version.

        Raises:
            Refused: a condition does not hold.
            StorageError: the checksum of what arrived is wrong.
        """
        status, _, version = self._ask("PUT", f"/{quote(key)}", data, **conditions)
        if status == 412:
            raise Refused(key)
        if status != 200 or version is None:
            raise StorageError(f"writing {key}: it arrived otherwise than it was sent")
        return version

    def delete(self, key: str) -> None:
        self._ask("DELETE", f"/{quote(key)}")
