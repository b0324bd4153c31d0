"""A server of a folder's files by HTTP, with ranges, versions, a limited rate, and a count of what it sent.

It is a process of its own, so that it takes none of the time of what reads from it: `serving` starts one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from jobs.benchmarks.commands import ours

BLOCK = 1 << 18  # bytes sent at once: at 1 GB/s, a quarter of a millisecond
COUNTS = "/counts-of-the-server"  # GET returns what was sent since the last time, as JSON


class Rate:
    """A limit of bytes a second over all connections, with bursts of a hundredth of a second; None has no limit."""

    def __init__(self, per_s: float | None) -> None:
        self._per_s = per_s
        self._lock = threading.Lock()
        self._free_at = 0.0  # when all bytes have passed that may, at this rate

    def wait(self, count: int) -> None:
        """Wait until so many more bytes may pass."""
        if self._per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.01) + count / self._per_s
            pause = self._free_at - now
        if pause > 0:
            time.sleep(pause)


class Handler(BaseHTTPRequestHandler):
    """The answers to requests for files."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    root: ClassVar[Path]
    rate: ClassVar[Rate]
    lock = threading.Lock()
    counts: ClassVar[dict[str, int]] = {"requests": 0, "bytes": 0}

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path == COUNTS:
            return self._say_counts()
        path = (self.root / self.path.lstrip("/")).resolve()
        with self.lock:
            self.counts["requests"] += 1
        if not path.is_relative_to(self.root) or not path.is_file():
            return self._head(404, 0, {})
        status = path.stat()
        start, stop = self._range(status.st_size)
        headers = {"ETag": f'"{status.st_mtime_ns:x}-{status.st_size:x}"', "Accept-Ranges": "bytes"}
        if "Range" not in self.headers:
            self._head(200, stop, headers)
        else:
            said = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{status.st_size}"}
            self._head(206, stop - start, said)
        if self.command == "GET":
            self._send(path, start, stop)
        return None

    def _range(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 0, size
        return min(int(match[1]), size), min(int(match[2]) + 1, size) if match[2] else size

    def _head(self, status: int, size: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def _send(self, path: Path, start: int, stop: int) -> None:
        with path.open("rb", buffering=0) as file:
            for at in range(start, stop, BLOCK):
                size = min(BLOCK, stop - at)
                self.rate.wait(size)
                file.seek(at)
                with self.lock:  # before they are sent, so that who has read them finds them counted
                    self.counts["bytes"] += size
                self.wfile.write(file.read(size))

    def _say_counts(self) -> None:
        with self.lock:
            said = json.dumps(self.counts).encode()
            self.counts.update(dict.fromkeys(self.counts, 0))
        self._head(200, len(said), {})
        self.wfile.write(said)


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str

    def counts(self) -> dict[str, int]:
        """Return the requests and bytes since the last time."""
        with urllib.request.urlopen(self.url + COUNTS, timeout=60) as answer:  # noqa: S310  # our own server
            found: dict[str, int] = json.load(answer)
        return found


@contextmanager
def serving(folder: Path, rate_mb_s: float | None) -> Iterator[Served]:
    """Serve a folder during the block, at no more than so many megabytes (1e6 bytes) a second."""
    command = [sys.executable, "-m", "jobs.benchmarks.range_server", str(folder), str(rate_mb_s or 0)]
    environment = {**os.environ, **ours()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            yield Served(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()


def main(folder: str, rate_mb_s: str) -> None:
    Handler.root = Path(folder).resolve()
    Handler.rate = Rate(float(rate_mb_s) * 1e6 or None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    # It ends when the benchmark does, however that ends: then the pipe is closed.
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
