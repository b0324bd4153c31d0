"""Servers of objects and of files for tests, on free ports of this machine: others' imitations of S3 and Azure, plain
HTTP with and without ranges."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from loaders.storage.address import Address
from loaders.storage.objects.services import EMULATOR

BUCKET = "models"


@contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of this process's environment during the block, which its subprocesses inherit; None unsets one."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def s3() -> Iterator[Address]:
    """Run moto's S3 with an empty bucket."""
    import botocore.session
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key-of-tests", "AWS_REGION": "us-east-1",
        "AWS_SECRET_ACCESS_KEY": "secret-of-tests", "AWS_EC2_METADATA_DISABLED": "true", "AWS_PROFILE": None,
    }  # fmt: skip
    try:
        with environment(variables):
            client = botocore.session.Session().create_client("s3", region_name="us-east-1")
            client.create_bucket(Bucket=BUCKET)
            yield Address.of(f"s3://{BUCKET}")
    finally:
        server.stop()


# moto does not check signatures, but asks for one.
SIGNED = "AWS4-HMAC-SHA256 Credential=tests/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class Google:
    """moto's S3 as Google's XML interface, which differs in the conditions of writes: they name generations.

    PyPI's emulators of Google's storage (gcp-storage-emulator, fake-gcs-server) lack the XML interface, by which
    obstore writes.
    """

    def __init__(self, s3: Any) -> None:
        self._s3 = s3
        self._tags: dict[str, str] = {}  # by generation

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        wanted = environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None)
        environ["HTTP_AUTHORIZATION"] = SIGNED
        if wanted == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"
        elif wanted is not None:
            environ["HTTP_IF_MATCH"] = self._tags.get(wanted, '"none"')

        def begin(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            tag = next((value for name, value in headers if name.lower() == "etag"), None)
            if tag is not None:
                generation = str(zlib.crc32(tag.encode()) + 1)
                self._tags[generation] = tag
                headers = [*headers, ("x-goog-generation", generation)]
            return start(status, headers, *more)

        return self._s3(environ, begin)


@contextmanager
def gs() -> Iterator[Address]:
    """Run an imitation of Google's storage with an empty bucket."""
    from moto.server import create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_server("127.0.0.1", 0, Google(create_backend_app("s3")), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        urlopen(Request(f"{url}/{BUCKET}", method="PUT")).close()
        with environment({"STORAGE_EMULATOR_HOST": url}):
            yield Address.of(f"gs://{BUCKET}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


AZURITE = "azurite-blob"


def azurite() -> str | None:
    """Return the command of azurite, npm's imitation of Azure's blobs, if it is installed."""
    return os.environ.get("WEIGHTMILL_AZURITE") or shutil.which(AZURITE)


@contextmanager
def az(command: str) -> Iterator[Address]:
    """Run azurite with an empty container."""
    from azure.storage.blob import BlobServiceClient

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--blobPort", str(port), "--inMemoryPersistence", "--silent", "--skipApiVersionCheck"]
    with subprocess.Popen([command, *arguments], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            while str(port) not in server.stdout.readline():
                assert server.poll() is None
            variables = {
                "AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
                "AZURE_STORAGE_CONNECTION_STRING": None,
            }  # fmt: skip
            with environment(variables):
                url = f"http://127.0.0.1:{port}/{EMULATOR.name}"
                with BlobServiceClient(url, credential=EMULATOR.key) as client:
                    client.create_container(BUCKET).close()
                yield Address.of(f"az://{BUCKET}")
        finally:
            server.terminate()


class Files(BaseHTTPRequestHandler):
    """A server of the files in a folder, whose answers tests change by the fields of its class."""

    protocol_version = "HTTP/1.1"
    root: Path
    has_ranges = True
    has_tags = True
    refuses_lists = False
    spoil: str | None = None  # how bodies and headers are wrong: see `_answer`
    spared = 1
    fails: list[tuple[int, str]]  # statuses and codes with which the next requests are answered
    asked: list[tuple[str, str, str | None, str | None]]  # method, path, Range, Authorization

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.asked.append((self.command, self.path, asked, self.headers.get("Authorization")))
        if self.fails:
            status, code = self.fails.pop(0)
            return self._say(status, {}, f"<Error><Code>{code}</Code></Error>".encode())
        if "list-type" in self.path and self.refuses_lists:
            return self._say(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
        path = self.root / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            if self.spoil == "page":
                return self._say(200, {"Content-Type": "text/html"}, b"<html>no such page</html>")
            # S3 says so of what does not exist, to whom it does not show what does.
            return self._say(403 if self.refuses_lists else 404, {}, b"")
        data = path.read_bytes()
        tags = {"ETag": f'"{hash(data)}"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"} if self.has_tags else {}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        if not self.has_ranges or found is None or self.command == "HEAD":
            return self._say(200, tags, data)
        start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
        if start >= len(data):
            return self._say(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        return self._answer(start, stop, data, tags)

    def _answer(self, start: int, stop: int, data: bytes, tags: dict[str, str]) -> None:
        # Looking a file up, and what is left after a body that broke, are answered well.
        body, spoil = data[start:stop], self.spoil if stop - start > self.spared else None
        shift = 1 if spoil == "range" else 0
        headers = {**tags, "Content-Range": f"bytes {start + shift}-{stop - 1 + shift}/{len(data)}"}
        if spoil == "tag":
            headers["ETag"] = '"another"'
        if spoil == "long":
            body += b"more"
        if spoil == "short":
            body = body[: len(body) // 2 + 1]
        if spoil == "cut":
            return self._say(206, headers, body[: len(body) // 2 + 1], stated=len(body))
        return self._say(206, headers, body)

    def _say(self, status: int, headers: Mapping[str, str], body: bytes, stated: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if stated is None else stated))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if stated is not None:
            self.close_connection = True


@contextmanager
def http(root: Path) -> Iterator[tuple[Address, type[Files]]]:
    """Serve a folder's files by HTTP; yields the address and the class whose fields change the answers."""

    class Handler(Files):
        fails: list[tuple[int, str]] = []  # noqa: RUF012  # shared by all requests, on purpose
        asked: list[tuple[str, str, str | None, str | None]] = []  # noqa: RUF012

    Handler.root = root
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Address.of(f"http://127.0.0.1:{server.server_port}"), Handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
