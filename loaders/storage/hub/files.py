"""The files of the Hub's repositories: listings of commits, and bytes by ranges.

Files that the Hub stores as Xet are read by HTTP ranges like all others: it redirects such reads to a bridge, which
serves ranges as a plain CDN does. Another host than the Hub is never sent the token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from loaders.errors import BadCheckpoint, StorageError
from loaders.storage.hub.client import HubClient, session
from loaders.storage.patience import Passing
from loaders.storage.settings import current

HOPS = 5  # redirects of one request: a renamed repository, and the CDN
# Bytes that count as progress: a request that was cut after so many goes on at once, with its patience renewed.
PROGRESS = 64 << 10
PAGES = 10_000  # of a listing, at most: a server could lead in a circle
GONE = (401, 403, 404, 410)  # what CDNs answer when a signature has expired


@dataclass(frozen=True, slots=True)
class HubFile:
    """A version of a file on the Hub. `tag` is its sha256, or git's hash of it for a file that is not stored by LFS."""

    repo: str
    commit: str
    path: str
    size: int
    tag: str

    @property
    def shown(self) -> str:
        return f"hf://{self.repo}@{self.commit[:12]}/{self.path}"


@dataclass(slots=True)
class _Route:
    """Where a file's bytes were found: a signed address that serves until it expires."""

    url: str
    etag: str | None = None


class HubFiles:
    """The files of the Hub, for one account. Listings of commits, which do not change, are kept."""

    def __init__(self, client: HubClient) -> None:
        self._client = client
        self._routes: dict[HubFile, _Route] = {}
        self._trees: dict[tuple[str, str], Mapping[str, HubFile]] = {}

    def tree(self, repo: str, commit: str) -> Mapping[str, HubFile]:
        """Return the files of a commit by their paths."""
        where = f"hf://{repo}@{commit}"
        if (repo, commit) not in self._trees:
            files: dict[str, HubFile] = {}
            path: str | None = f"/api/models/{repo}/tree/{commit}?recursive=true"
            for _ in range(PAGES):
                if path is None:
                    break
                answer = self._client.ask(where, "GET", path)
                files |= {file.path: file for file in _files(self._client.value(where, answer), repo, commit, where)}
                more = answer.links.get("next", {}).get("url")
                # A mirror passes on the address that the Hub itself has, and the token is for this endpoint alone.
                parts = urlsplit(more) if isinstance(more, str) else None
                path = None if parts is None else f"/{parts.path.lstrip('/')}?{parts.query}"
            else:
                raise StorageError(f"{where}: its listing does not end")
            self._trees[repo, commit] = files
        return self._trees[repo, commit]

    def read(self, file: HubFile, start: int, stop: int) -> memoryview:
        """Read bytes [start, stop) of a file, and go on in the middle where a connection was cut.

        Raises:
            BadCheckpoint: what is there has another size or hash than the commit's file.
            StorageError, NotThere: as `ask`.
        """
        data, at = memoryview(bytearray(stop - start)), 0
        while at < len(data):
            fill = partial(self._some, file, start, data, at)
            at = self._client.patient(f"reading {file.shown}", fill)
        return data

    def _some(self, file: HubFile, start: int, data: memoryview, at: int) -> int:
        """Fill `data` from `at` on, as far as one request goes; returns how far that is."""
        done = at
        with self._client.traffic.request():
            try:
                with self._client.failures(), self._opened(file, start + at, start + len(data)) as answer:
                    for chunk in answer.iter_raw():
                        if done + len(chunk) > len(data):
                            raise StorageError(f"{file.shown}: the server sends more bytes than were asked for")
                        data[done : done + len(chunk)] = chunk
                        done += len(chunk)
                if done < len(data) and done - at < PROGRESS:
                    raise Passing(f"the body ended after {done - at} of {len(data) - at} bytes")
            except Passing:
                if done - at < PROGRESS:
                    raise
            finally:
                self._client.traffic.moved(fetched=done - at)
        return done

    @contextmanager
    def _opened(self, file: HubFile, start: int, stop: int) -> Iterator[Any]:
        """Request bytes of a file from where they were found before, else by the Hub's redirect."""
        own = f"{self._client.endpoint}/{file.repo}/resolve/{file.commit}/{quote(file.path)}"
        route = self._routes.get(file)
        is_fresh, url = route is None, own if route is None else route.url
        for _ in range(HOPS):
            headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            is_own = _origin(url) == _origin(self._client.endpoint)
            if is_own:
                headers = {**self._client.headers, **headers}
            request = {"headers": headers, "timeout": current().timeout_s, "follow_redirects": False}
            with session().stream("GET", url, **request) as answer:
                if is_own:
                    _check_version(file, answer.headers)
                if answer.status_code in (301, 302, 303, 307, 308):
                    url = _target(file, url, answer.headers.get("Location"))
                    continue
                if not is_own and not is_fresh and answer.status_code in GONE:
                    # The signature has expired.
                    self._routes.pop(file, None)
                    route, is_fresh, url = None, True, own
                    continue
                if not is_own and answer.status_code in GONE:
                    raise StorageError(f"{file.shown}: the CDN that the Hub names refuses it ({answer.status_code})")
                self._client.check(file.shown, answer)
                _check_range(file, start, stop, answer)
                if not is_own:
                    self._pin(file, url, answer.headers.get("ETag"))
                yield answer
                return
        raise StorageError(f"{file.shown}: more than {HOPS} redirects")

    def _pin(self, file: HubFile, url: str, etag: str | None) -> None:
        route = self._routes.get(file)
        if route is None or route.url != url:
            self._routes[file] = _Route(url, etag)
        elif route.etag != etag:
            raise _changed(file, f"ETag {route.etag} before, {etag} now")


@lru_cache(maxsize=8)
def files_of(client: HubClient) -> HubFiles:
    """Return the files that a client may read: the same ones for all who ask, so that what is known is shared."""
    return HubFiles(client)


# --- answers


def _files(rows: Any, repo: str, commit: str, where: str) -> Iterator[HubFile]:
    """Check a page of a listing.

    Raises:
        BadCheckpoint: it is no listing, or a name in it leads out of the repository.
    """
    if not isinstance(rows, list):
        raise BadCheckpoint(f"{where}: the Hub's answer is no listing of files")
    for row in rows:
        match row:
            case {"type": "directory"}:
                continue
            case {"type": "file", "path": str(path), "lfs": {"oid": str(tag), "size": int(size)}}:
                pass
            case {"type": "file", "path": str(path), "oid": str(tag), "size": int(size)}:
                pass
            case _:
                raise BadCheckpoint(f"{where}: the Hub's answer is no listing of files")
        parts = path.split("/")
        if size < 0 or not path.isprintable() or any(part in ("", ".", "..") for part in parts):
            raise BadCheckpoint(f"{where}: its listing names {path[:200]!r} of {size} bytes; do not trust it")
        yield HubFile(repo, commit, path, size, tag.removeprefix("sha256:"))


def _check_version(file: HubFile, headers: Mapping[str, str]) -> None:
    """Check that what the Hub says of a file is what its listing said.

    Raises:
        BadCheckpoint: it is another version.
    """
    commit, size = headers.get("X-Repo-Commit"), headers.get("X-Linked-Size")
    if commit is not None and commit != file.commit:
        raise _changed(file, f"commit {commit[:40]}")
    if size is not None and size != str(file.size):
        raise _changed(file, f"{size[:20]} bytes where the listing says {file.size}")
    etag = headers.get("X-Linked-ETag") or (headers.get("ETag") if commit is not None else None)
    if etag is not None and etag.removeprefix("W/").strip('"') != file.tag:
        raise _changed(file, f"ETag {etag[:80]} where the listing says {file.tag}")


def _check_range(file: HubFile, start: int, stop: int, answer: Any) -> None:
    """Check that an answer's body is the range that was asked for, or its first part.

    Raises:
        BadCheckpoint: the file has another size.
        StorageError: it is another range, or all of the file where a part was asked for.
    """
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise StorageError(f"{file.shown}: the server packs its bytes ({answer.headers['Content-Encoding'][:20]})")
    if answer.status_code == 200 and (start, stop) == (0, file.size):
        return
    said = answer.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", said)
    if answer.status_code != 206 or found is None:
        raise StorageError(f"{file.shown}: the server answers {answer.status_code} and gives no ranges of it")
    if found[3] not in ("*", str(file.size)):
        raise _changed(file, f"{found[3]} bytes where the listing says {file.size}")
    if int(found[1]) != start or int(found[2]) >= stop:
        raise StorageError(f"{file.shown}: asked for bytes {start} to {stop - 1}, the server sends {said}")


def _changed(file: HubFile, found: str) -> BadCheckpoint:
    return BadCheckpoint(f"{file.shown}: it changed while it was read: {found}; load it again")


def _target(file: HubFile, url: str, location: str | None) -> str:
    """Return where a redirect leads.

    Raises:
        StorageError: nowhere that can be followed.
    """
    try:
        target = urljoin(url, location or "")
        parts = urlsplit(target)
        is_good = bool(location) and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or not target.isascii() or not target.isprintable():
        raise StorageError(f"{file.shown}: the Hub redirects to no address that can be followed")
    if urlsplit(url).scheme == "https" and parts.scheme != "https":
        raise StorageError(f"{file.shown}: the Hub redirects from https to http, which is not followed")
    return target


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
