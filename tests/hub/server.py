"""A Hub for tests, in this process: what huggingface_hub and weightmill ask of huggingface.co, on two ports.

The first port is the Hub, the second its CDN, to which reads of LFS files are redirected with a signed query.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repository import File, Refused, Repositories, Repository, lfs_mode

REPO = r"(?P<repo>[\w.\-]+/[\w.\-]+)"


@dataclass
class Fault:
    """What a test wants of requests whose path has `pattern` in it, so many `times`.

    status: the answer, with `headers`; None answers as usual.
    cut_at: bytes of the body after which the connection is closed.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] | None = None
    cut_at: int | None = None
    change: Callable[[dict[str, str], bytes], bytes] | None = None  # of the answer's headers and body
    before: Callable[[], object] = lambda: None  # called before the request is served


class Hub(Repositories):
    """The Hub: its repositories, its addresses, and what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []  # "METHOD PATH" of every request to the Hub, in order
        self.sent: Counter[str] = Counter()  # bytes of files' bodies, by "REPO/PATH"
        self.gets: Counter[str] = Counter()  # requests for files' bytes, by "REPO/PATH"
        self.uploaded: Counter[str] = Counter()  # uploads of LFS objects, by sha256
        self.leaked: list[str] = []  # requests to the CDN that had a token
        self.signed: dict[str, tuple[Repository, File, str]] = {}  # by signature
        self.faults: list[Fault] = []
        self.page = 1000  # entries of the tree in an answer
        self.part: int | None = None  # bytes of a part, if uploads come in parts
        self.parts: dict[tuple[str, int], bytes] = {}
        self._numbers = itertools.count(1)
        self._servers = [_server(self, _Hub), _server(self, _Cdn)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn(self) -> str:
        # Another host, not just another port: as a name it differs from the Hub's.
        return f"http://localhost:{self._servers[1].server_port}"

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def expire(self) -> None:
        """Let all signed addresses expire."""
        with self.lock:
            self.signed.clear()

    def sign(self, repository: Repository, file: File, path: str) -> str:
        with self.lock:
            signature = f"sig{next(self._numbers):06d}"
            self.signed[signature] = repository, file, path
        return f"{self.cdn}/objects/{file.sha256}?X-Signature={signature}"

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.pattern in path:
                    fault.times -= 1
                    fault.before()
                    return fault
        return None

    def requests(self, pattern: str) -> int:
        return sum(pattern in each for each in self.asked)


def _server(hub: Hub, kind: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    handler = type(kind.__name__, (kind,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


class _Base(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def setup(self) -> None:
        super().setup()
        self._fault: Fault | None = None

    @property
    def token(self) -> str | None:
        given = self.headers.get("Authorization")
        return None if given is None else given.removeprefix("Bearer ")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        fault, cut = self._fault, None
        if fault is not None and fault.status is not None:
            status, data, given = fault.status, b"", dict(fault.headers or {})
        elif fault is not None:
            cut = fault.cut_at
        given["Content-Length"] = str(len(data))
        if fault is not None and fault.change is not None:
            data = fault.change(given, data)
        self.send_response(status)
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True
            self.connection.close()

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def refuse(self, refused: Refused) -> None:
        headers = {"X_Error_Message": refused.message}
        if refused.code:
            headers["X_Error_Code"] = refused.code
        self.json({"error": refused.message}, refused.status, **headers)

    def send_file(self, repository: Repository, file: File, path: str, **headers: str) -> None:
        """Answer with a file's bytes, or the range that was asked for."""
        data, size = repository.objects[file.sha256], file.size
        name = f"{repository.name}/{path}"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            status, part = 200, data
        else:
            start, stop = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else size, size)
            if start >= size:
                return self.answer(416, Content_Range=f"bytes */{size}")
            status, part = 206, data[start:stop]
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
        with self.hub.lock:
            self.hub.gets[name] += self.command == "GET"
            self.hub.sent[name] += len(part) if self.command == "GET" else 0
        return self.answer(status, part, Accept_Ranges="bytes", **headers)

    def serve(self) -> None:
        self._fault = self.hub.fault(self.path)
        try:
            self.route()
        except Refused as refused:
            self.refuse(refused)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def route(self) -> None:
        raise NotImplementedError


class _Cdn(_Base):
    def route(self) -> None:
        parts = urlsplit(self.path)
        if self.token is not None:
            self.hub.leaked.append(self.path)
        [signature] = parse_qs(parts.query).get("X-Signature", [""])
        with self.hub.lock:
            found = self.hub.signed.get(signature)
        if found is None:
            raise Refused(403, "Request has expired")
        repository, file, path = found
        self.send_file(repository, file, path, ETag=f'"{hashlib.md5(file.sha256.encode()).hexdigest()}"')


class _Hub(_Base):
    def route(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        with hub.lock:
            hub.asked.append(f"{self.command} {self.path}")
        data = self.body() if self.command in ("POST", "PUT") else b""
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, parts.path)
            if found is not None and (self.command == method or (self.command, method) == ("HEAD", "GET")):
                groups = {name: unquote(value or "") for name, value in found.groupdict().items()}
                with hub.lock:
                    account = hub.account(self.token) if act.__name__ not in UNSIGNED else None
                return act(self, account, groups, query, data)
        raise Refused(404, f"no such route: {self.command} {parts.path}")

    # --- reading

    def info(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        repository = self.hub.to_read(found["repo"], account)
        commit = repository.resolved(found.get("revision") or "main")
        self.json(
            {
                "id": repository.name, "modelId": repository.name, "sha": commit, "private": repository.is_private,
                "gated": "auto" if repository.gated_for is not None else False, "disabled": False, "tags": [],
                "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in repository.files(commit)],
            }
        )  # fmt: skip

    def tree(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        repository = self.hub.to_read(found["repo"], account)
        files = repository.files(found["revision"])
        rows = [_row(path, file) for path, file in sorted(files.items())]
        folders = sorted({path[:at] for path in files for at, letter in enumerate(path) if letter == "/"})
        rows += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        if query.get("recursive", "").lower() != "true":
            rows = [row for row in rows if "/" not in row["path"]]
        start = int(query.get("cursor", 0))
        more = {}
        if start + self.hub.page < len(rows):
            place = f"{urlsplit(self.path).path}?recursive=true&cursor={start + self.hub.page}"
            # The address that the Hub has outside, as a mirror would pass it on.
            more["Link"] = f'<https://huggingface.co{place}>; rel="next"'
        self.json(rows[start : start + self.hub.page], **more)

    def paths_info(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        files = self.hub.to_read(found["repo"], account).files(found["revision"])
        self.json([_row(path, files[path]) for path in json.loads(data)["paths"] if path in files])

    def refs(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        branches = self.hub.to_read(found["repo"], account).branches
        rows = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches.items()]
        self.json({"branches": rows, "tags": [], "converts": []})

    def commits(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        repository = self.hub.to_read(found["repo"], account)
        rows = [
            {"id": oid, "title": message, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for oid, message in reversed(repository.messages.items())
        ]
        self.json(rows)

    def resolve(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        repository = self.hub.to_read(found["repo"], account, content=True)
        commit, path = repository.resolved(found["revision"]), found["path"]
        file = repository.files(commit).get(path)
        if file is None:
            raise Refused(404, f"{path} does not exist on {found['revision']}", "EntryNotFound")
        if not file.is_lfs:
            return self.send_file(repository, file, path, ETag=f'"{file.etag}"', X_Repo_Commit=commit)
        return self.answer(
            302,
            Location=self.hub.sign(repository, file, path), X_Repo_Commit=commit, X_Linked_Size=str(file.size),
            X_Linked_ETag=f'"{file.etag}"',
        )  # fmt: skip

    # --- writing

    def create(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        asked = json.loads(data)
        owner = asked.get("organization") or account
        name = f"{owner}/{asked['name']}"
        if account is None or owner != account:
            raise Refused(
                401 if account is None else 403, "You don't have the rights to create a model under this namespace"
            )
        with self.hub.lock:
            is_there = self.hub.exists(name)
            if not is_there:
                self.hub.create(name, is_private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.json({"url": f"{self.hub.url}/{name}"}, 409 if is_there else 200)

    def branch(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        repository = self.hub.to_write(found["repo"], account)
        with self.hub.lock:
            if found["branch"] in repository.branches:
                raise Refused(409, "Reference already exists")
            start = json.loads(data or b"{}").get("startingPoint") or "main"
            repository.branches[found["branch"]] = repository.resolved(start)
        self.json({})

    def preupload(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        repository = self.hub.to_write(found["repo"], account)
        there = repository.files(found["revision"])
        rows = []
        for row in json.loads(data)["files"]:
            path, is_lfs = row["path"], lfs_mode(row["path"], row["size"], base64.b64decode(row["sample"]))
            oid = there[path].etag if path in there else None
            mode = "lfs" if is_lfs else "regular"
            rows.append({"path": path, "shouldIgnore": False, "uploadMode": mode, "oid": oid})
        self.json({"files": rows})

    def batch(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        repository, asked = self.hub.to_write(found["repo"], account), json.loads(data)
        self.json({"transfer": "basic", "objects": [self._batch_row(repository, row) for row in asked["objects"]]})

    def _batch_row(self, repository: Repository, row: dict[str, Any]) -> dict[str, Any]:
        oid, size = row["oid"], row["size"]
        if oid in repository.objects:
            return {"oid": oid, "size": size}
        place = f"{self.hub.url}/lfs/{repository.name}/{oid}"
        verify = {"href": f"{self.hub.url}/lfs-verify/{repository.name}/{oid}", "header": {}}
        if self.hub.part is None or size <= self.hub.part:
            return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{place}?signed=1"}, "verify": verify}}
        count = -(-size // self.hub.part)
        header = {str(number): f"{place}?part={number}" for number in range(1, count + 1)}
        upload = {"href": f"{place}?complete={count}", "header": {"chunk_size": str(self.hub.part), **header}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def put_object(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        oid = found["oid"]
        with self.hub.lock:
            if "part" in query:
                self.hub.parts[oid, int(query["part"])] = data
                return self.answer(200, ETag=f'"{hashlib.md5(data).hexdigest()}"')
            if "complete" in query:
                data = b"".join(self.hub.parts.pop((oid, number)) for number in range(1, int(query["complete"]) + 1))
            if hashlib.sha256(data).hexdigest() != oid:
                raise Refused(400, "the bytes are not those of the oid")
            self.hub.get(found["repo"]).objects[oid] = data
            self.hub.uploaded[oid] += 1
        return self.json({}, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def verify(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        stored = self.hub.to_write(found["repo"], account).objects.get(found["oid"])
        if stored is None or len(stored) != json.loads(data)["size"]:
            raise Refused(404, "Object not found")
        self.json({})

    def commit(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        repository, branch = self.hub.to_write(found["repo"], account), found["revision"]
        rows = [json.loads(line) for line in data.splitlines()]
        header = next(row["value"] for row in rows if row["key"] == "header")
        with self.hub.lock:
            head = repository.branches.get(branch)
            if head is None:
                raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            if header.get("parentCommit", head) != head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.files(head))
            for row in rows:
                _apply(repository, files, row["key"], row["value"])
            oid = repository.commit(branch, files, header["summary"])
        self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repository.name}/commit/{oid}"})

    def validate(self, account: str | None, found: dict[str, str], query: dict[str, str], data: bytes) -> None:
        self.json({"errors": [], "warnings": []})


Act = Callable[[_Hub, "str | None", dict[str, str], dict[str, str], bytes], None]
UNSIGNED = ("put_object",)  # their addresses are signed
ROUTES: tuple[tuple[str, str, Act], ...] = (
    ("POST", "/api/repos/create", _Hub.create),
    ("POST", "/api/validate-yaml", _Hub.validate),
    ("GET", f"/api/models/{REPO}", _Hub.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", _Hub.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)", _Hub.tree),
    ("GET", f"/api/models/{REPO}/refs", _Hub.refs),
    ("GET", f"/api/models/{REPO}/commits/(?P<revision>[^/]+)", _Hub.commits),
    ("POST", f"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)", _Hub.paths_info),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", _Hub.branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", _Hub.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", _Hub.commit),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", _Hub.batch),
    ("PUT", f"/lfs/{REPO}/(?P<oid>[0-9a-f]+)", _Hub.put_object),
    ("POST", f"/lfs/{REPO}/(?P<oid>[0-9a-f]+)", _Hub.put_object),
    ("POST", f"/lfs-verify/{REPO}/(?P<oid>[0-9a-f]+)", _Hub.verify),
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Hub.resolve),
)


def _row(path: str, file: File) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.is_lfs:
        row["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return row


def _apply(repository: Repository, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    """Apply an operation of a commit to the files of its parent."""
    path = value.get("path", "")
    if key == "file":
        files[path] = repository.file_of(base64.b64decode(value["content"]), is_lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in repository.objects:
            raise Refused(400, f"lfs object {value['oid']} was not uploaded")
        files[path] = repository.stored(value["oid"], is_lfs=True)
    elif key == "deletedFile":
        if path not in files:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        del files[path]


@contextmanager
def serving() -> Iterator[Hub]:
    """Run an empty Hub during the block."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()
