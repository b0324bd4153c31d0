"""A proxy that injects faults between a client and an HTTP server of this machine, and counts what passes.

    with Proxy("http://127.0.0.1:9000") as proxy:
        proxy.add(Status(503, retry_after_s=1), times=3, path="/bucket/.*safetensors")
        proxy.add(Cut(after=1000), chance=0.05)
        ...  # a client of proxy.url
        assert proxy.count("GET", "/bucket/.*") == 4

It runs in threads of this process. The Host header is the client's own, so the URLs that a server makes of it lead
through the proxy again. A fault is of one request; the first of those that were added which applies to it is taken.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

from jobs.benchmarks.range_server import Rate

BLOCK = 1 << 16  # bytes of one read or write
NOT_FORWARDED = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "proxy-connection"}


# --- faults


@dataclass(frozen=True)
class Refuse:
    """The connection is reset before the request reaches the server."""


@dataclass(frozen=True)
class Lose:
    """The request reaches the server, and the connection is reset before its answer is sent."""


@dataclass(frozen=True)
class Status:
    """An answer of the proxy's own; the request does not reach the server."""

    status: int
    retry_after_s: float | None = None
    body: bytes = b""


@dataclass(frozen=True)
class Cut:
    """The connection ends in the middle of the body, after so many bytes of it."""

    after: int


@dataclass(frozen=True)
class Truncate:
    """The body ends after so many bytes, and the answer's length says so, with the right status."""

    after: int


@dataclass(frozen=True)
class Lengthen:
    """The body has more bytes than were asked for, and the answer's length says so."""

    by: int


@dataclass(frozen=True)
class Flip:
    """The byte of the body at a place has other bits."""

    at: int = 0


@dataclass(frozen=True)
class Header:
    """A header of the answer has another value; None removes it."""

    name: str
    value: str | None


@dataclass(frozen=True)
class Stall:
    """Nothing more is sent after so many bytes of the body, until the client hangs up or the proxy is closed."""

    after: int = 0


@dataclass(frozen=True)
class Trickle:
    """The body comes one byte at a time, each after a pause."""

    pause_s: float


@dataclass(frozen=True)
class Lag:
    """The answer is what the server gave to the same request when the fault first applied to it: a list that lags."""


Fault = Refuse | Lose | Status | Cut | Truncate | Lengthen | Flip | Header | Stall | Trickle | Lag


@dataclass
class Rule:
    """A fault, and the requests that get it; `hits` is how many did."""

    fault: Fault
    method: str
    path: re.Pattern[str]
    skip: int
    times: int | None
    chance: float
    hits: int = 0
    remembered: dict[tuple[str, str], Answer] = field(default_factory=dict)


@dataclass
class Seen:
    """A request that arrived: its method, its target with the query, its range, and what is answered to it.

    `received` and `sent` are the bytes of its body, and of the answer's, that passed so far; the status is 0 until an
    answer begins.
    """

    method: str
    target: str
    range: str | None
    status: int = 0
    received: int = 0
    sent: int = 0


# --- the proxy


class Proxy:
    """A proxy before the server at `upstream`, at an own port of 127.0.0.1.

    `rate_mb_s` limits the bodies in both directions together, in megabytes (1e6 bytes) a second.
    """

    def __init__(self, upstream: str, *, rate_mb_s: float | None = None, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.closed = threading.Event()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._seen: list[Seen] = []
        self._rate = Rate(None if rate_mb_s is None else rate_mb_s * 1e6)
        self._listen(0)

    def _listen(self, port: int) -> None:
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self.port = self._server.server_port
        # serve_forever looks every `poll_interval` whether it shall end, so this is how long closing takes.
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()
        self._stop()

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse all connections during the block, those that are open included."""
        self._stop()
        try:
            yield
        finally:
            self._listen(self.port)

    # --- faults

    def add(
        self,
        fault: Fault,
        *,
        method: str = "",
        path: str = "",
        skip: int = 0,
        times: int | None = None,
        chance: float = 1.0,
    ) -> Rule:
        """Give a fault to requests of a method whose target (path and query) has a match of `path`.

        The first `skip` of them are spared, and it ends after `times`; the others get it by chance.
        """
        rule = Rule(fault, method, re.compile(path), skip, times, chance)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Take away all faults."""
        with self._lock:
            self._rules.clear()

    def rule_for(self, method: str, target: str) -> Rule | None:
        """Return the rule that applies to a request, and count it there."""
        with self._lock:
            for rule in self._rules:
                if rule.method not in ("", method) or not rule.path.search(target) or rule.times == 0:
                    continue
                if rule.skip:
                    rule.skip -= 1
                elif self._random.random() < rule.chance:
                    rule.hits += 1
                    rule.times = None if rule.times is None else rule.times - 1
                    return rule
        return None

    # --- what passed

    def note(self, seen: Seen) -> None:
        with self._lock:
            self._seen.append(seen)

    @property
    def seen(self) -> tuple[Seen, ...]:
        """The requests in the order of their arrival. A client that has an answer finds its request here."""
        with self._lock:
            return tuple(self._seen)

    def forget(self) -> None:
        """Begin to count anew."""
        with self._lock:
            self._seen.clear()

    def settle(self) -> None:
        """Wait until all clients have hung up, and what they asked for was answered."""
        while self._server.has_clients and not self.closed.wait(0.005):
            pass

    def _matching(self, method: str, path: str) -> list[Seen]:
        return [each for each in self.seen if method in ("", each.method) and re.search(path, each.target)]

    def count(self, method: str = "", path: str = "") -> int:
        """Return the number of requests of a method whose target has a match of `path`."""
        return len(self._matching(method, path))

    def sent(self, method: str = "", path: str = "") -> int:
        """Return the bytes of bodies that were sent in answer to such requests."""
        return sum(each.sent for each in self._matching(method, path))

    def received(self, method: str = "", path: str = "") -> int:
        """Return the bytes of such requests' own bodies."""
        return sum(each.received for each in self._matching(method, path))

    def limit(self, count: int) -> None:
        """Wait until so many bytes may pass."""
        self._rate.wait(count)


@dataclass
class Answer:
    """An answer of the server: its body is read in pieces, or whole if it is remembered."""

    status: int
    headers: list[tuple[str, str]]
    size: int | None
    body: Iterator[bytes] | bytes

    def pieces(self) -> Iterator[bytes]:
        return iter((self.body,)) if isinstance(self.body, bytes) else self.body

    def whole(self) -> Answer:
        """Return the answer with its body in memory, so that it can be given again."""
        body = b"".join(self.pieces())
        return Answer(self.status, self.headers, None if self.size is None else len(body), body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: Proxy

    def __init__(self, *args: object) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)  # type: ignore[arg-type]

    def process_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: object) -> None:
        self._open.discard(request)  # type: ignore[arg-type]
        super().shutdown_request(request)  # type: ignore[arg-type]

    @property
    def has_clients(self) -> bool:
        return bool(self._open)

    def hang_up(self) -> None:
        for each in list(self._open):
            with suppress(OSError):  # closed by its own thread meanwhile
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Do nothing: clients hang up, and connections are reset on purpose."""


class _Reset(Exception):
    """Ends a connection by a reset."""


class _Cut(Exception):
    """Ends a connection in the middle of a body; what was sent arrives."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    # An answer's head and body are two writes; the second would wait for the client to acknowledge the first.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._proxy = self.server.proxy
        self._upstream = http.client.HTTPConnection(*self._proxy.upstream, timeout=60)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""

    def _serve(self) -> None:
        rule = self._proxy.rule_for(self.command, self.path)
        self._seen = Seen(self.command, self.path, self.headers.get("Range"))
        self._proxy.note(self._seen)
        try:
            self._answer(rule)
        except _Cut:
            self.close_connection = True
        except (_Reset, OSError, http.client.HTTPException):
            self.close_connection = True
            with suppress(OSError):  # closed already
                # A linger time of zero makes closing a reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_OPTIONS = _serve

    def _answer(self, rule: Rule | None) -> None:
        fault = None if rule is None else rule.fault
        if isinstance(fault, Refuse):
            raise _Reset
        if isinstance(fault, Status):
            for _ in self._body():
                pass
            headers = [] if fault.retry_after_s is None else [("Retry-After", f"{fault.retry_after_s:g}")]
            return self._send(Answer(fault.status, headers, len(fault.body), fault.body), None)
        if rule is not None and isinstance(fault, Lag):
            first = rule.remembered.get((self.command, self.path))
            if first is None:
                first = rule.remembered.setdefault((self.command, self.path), self._forward().whole())
            return self._send(first, None)
        answer = self._forward()
        if isinstance(fault, Lose):
            answer.whole()
            raise _Reset
        return self._send(answer, fault)

    # --- to the server

    def _body(self) -> Iterator[bytes]:
        """Yield the request's body, in pieces."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self._taken(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            data = self.rfile.read(min(left, BLOCK))
            if not data:
                raise _Reset
            left -= len(data)
            yield self._taken(data)

    def _taken(self, data: bytes) -> bytes:
        self._seen.received += len(data)
        self._proxy.limit(len(data))
        return data

    def _forward(self) -> Answer:
        is_chunked = "Transfer-Encoding" in self.headers
        self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in NOT_FORWARDED:
                self._upstream.putheader(name, value)
        if is_chunked:
            self._upstream.putheader("Transfer-Encoding", "chunked")
        elif "Content-Length" in self.headers:
            self._upstream.putheader("Content-Length", self.headers["Content-Length"])
        self._upstream.endheaders()
        for piece in self._body():
            self._upstream.send(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
        if is_chunked:
            self._upstream.send(b"0\r\n\r\n")
        found = self._upstream.getresponse()
        headers = [(name, value) for name, value in found.getheaders() if name.lower() not in NOT_FORWARDED]
        size = found.getheader("Content-Length")
        return Answer(found.status, headers, None if size is None else int(size), iter(lambda: found.read(BLOCK), b""))

    # --- to the client

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        size, pieces = answer.size, answer.pieces()
        if isinstance(fault, Truncate):
            size = fault.after if size is None else min(size, fault.after)
            pieces = _first(pieces, size)
        elif isinstance(fault, Lengthen):
            size, pieces = None if size is None else size + fault.by, _longer(pieces, fault.by)
        elif isinstance(fault, Flip):
            pieces = _flipped(pieces, fault.at)
        headers = answer.headers
        if isinstance(fault, Header):
            headers = [(name, value) for name, value in headers if name.lower() != fault.name.lower()]
            headers += [] if fault.value is None else [(fault.name, fault.value)]
        # The server's own Date and Server are among the headers, so nothing is added here.
        self.send_response_only(answer.status)
        for name, value in headers:
            self.send_header(name, value)
        has_body = self.command != "HEAD" and answer.status not in (204, 304) and answer.status >= 200
        if size is not None and answer.status != 204:
            self.send_header("Content-Length", str(size))
        elif has_body:
            self.send_header("Transfer-Encoding", "chunked")
        self._seen.status = answer.status
        self.end_headers()
        if not has_body:
            for _ in pieces:
                pass
            return
        for piece in pieces:
            self._write(piece, fault, is_chunked=size is None)
        if size is None:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, piece: bytes, fault: Fault | None, *, is_chunked: bool) -> None:
        ends = fault.after - self._seen.sent if isinstance(fault, Cut | Stall) else len(piece)
        step = 1 if isinstance(fault, Trickle) else max(1, len(piece))
        data = piece[:ends]
        for at in range(0, len(data), step):
            if isinstance(fault, Trickle) and self._proxy.closed.wait(fault.pause_s):
                raise _Reset
            part = data[at : at + step]
            self._proxy.limit(len(part))
            self._seen.sent += len(part)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
        if len(data) == len(piece):
            return
        if isinstance(fault, Stall):
            self._wait_for_client()
        raise _Cut

    def _wait_for_client(self) -> None:
        """Wait until the client hangs up; when the proxy closes, its connections end, so this ends then, too."""
        self.connection.settimeout(None)
        with suppress(OSError):
            while self.connection.recv(BLOCK):
                pass


def _first(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Yield the first bytes. The others are read, too, so that the server's connection can be used again."""
    for piece in pieces:
        if size:
            yield piece[:size]
        size -= min(size, len(piece))


def _longer(pieces: Iterator[bytes], more: int) -> Iterator[bytes]:
    yield from pieces
    yield b"\xa5" * more


def _flipped(pieces: Iterator[bytes], at: int) -> Iterator[bytes]:
    for piece in pieces:
        if 0 <= at < len(piece):
            yield piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
        else:
            yield piece
        at -= len(piece)
