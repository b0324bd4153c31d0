"""The server: GET, PUT and DELETE of objects by key, with the conditions that object stores have.

GET /?prefix=P        [[key, size, version], ...]
GET /KEY              with Range and If-Match: 206, 404, or 412 if it is another version
PUT /KEY              with If-Match or If-None-Match: *: 200 and the version, 412, or 422 if x-xxh3 is wrong
DELETE /KEY           204, whether or not it exists
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import xxhash

VERSIONS = itertools.count(1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[bytes, str]] = {}  # noqa: RUF012  # shared by all requests, on purpose
    lock = threading.Lock()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path.lstrip("/"))

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "prefix" in query:
            prefix = query["prefix"][0]
            with self.lock:
                rows = [[k, len(d), v] for k, (d, v) in sorted(self.objects.items()) if k.startswith(prefix)]
            return self.answer(200, json.dumps(rows).encode())
        found = self.objects.get(self.key)
        if found is None:
            return self.answer(404)
        data, version = found
        if self.headers.get("If-Match", version) != version:
            return self.answer(412)
        start, stop = map(int, re.findall(r"\d+", self.headers.get("Range", f"bytes=0-{len(data) - 1}")))
        return self.answer(206, data[start : stop + 1], ETag=version)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("x-xxh3", xxhash.xxh3_128_hexdigest(data)) != xxhash.xxh3_128_hexdigest(data):
            return self.answer(422)
        with self.lock:
            _, version = self.objects.get(self.key, (b"", None))
            wanted = self.headers.get("If-Match")
            if (self.headers.get("If-None-Match") == "*" and version) or (wanted is not None and wanted != version):
                return self.answer(412)
            made = f"v{next(VERSIONS)}"
            self.objects[self.key] = (data, made)
        return self.answer(200, ETag=made)

    def do_DELETE(self) -> None:
        with self.lock:
            self.objects.pop(self.key, None)
        self.answer(204)


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"listening on {server.server_port}", flush=True)
    # It ends when the test process does, however that ends: then the pipe is closed.
    sys.stdin.read()


if __name__ == "__main__":
    main()
