"""The repositories of the test-suite's Hub: commits of files, branches, LFS objects, and who may do what."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".model")
INLINE_LIMIT = 10_000_000  # bytes; what is larger is an LFS object, whatever its name
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Refused(Exception):
    """A request that the Hub refuses: the HTTP status, its X-Error-Code, and its X-Error-Message."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class File:
    """A version of a file. `sha256` names its bytes; an LFS file's are in the repository's objects."""

    size: int
    sha256: str
    oid: str  # git's sha1, of an LFS file that of its pointer
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass
class Repository:
    """A repository with its history. `readers` are the accounts that may read it, None for all."""

    name: str
    owner: str
    is_private: bool = False
    gated_for: frozenset[str] | None = None  # the accounts that were given access, if it is gated
    objects: dict[str, bytes] = field(default_factory=dict)  # by sha256, LFS objects and others
    commits: dict[str, Mapping[str, File]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)  # of commits, in order
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": self.file_of(ATTRIBUTES, is_lfs=False)}, "initial commit")

    def file_of(self, data: bytes, *, is_lfs: bool) -> File:
        """Store bytes; returns the file that has them."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.objects[sha256] = data
        return self.stored(sha256, is_lfs=is_lfs)

    def stored(self, sha256: str, *, is_lfs: bool) -> File:
        """Return the file whose bytes are stored already."""
        data = self.objects[sha256]
        inside = data
        if is_lfs:
            inside = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        oid = hashlib.sha1(b"blob %d\0" % len(inside) + inside).hexdigest()
        return File(len(data), sha256, oid, is_lfs)

    def commit(self, branch: str, files: Mapping[str, File], message: str) -> str:
        """Make `files` all that a branch has; returns the commit's hash."""
        number = f"{self.name} {len(self.commits)} {message} {sorted(files.items())}"
        oid = hashlib.sha1(number.encode()).hexdigest()
        self.commits[oid], self.messages[oid] = dict(files), message
        self.branches[branch] = oid
        return oid

    def resolved(self, revision: str) -> str:
        found = self.branches.get(revision, revision)
        if found not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def files(self, revision: str) -> Mapping[str, File]:
        return self.commits[self.resolved(revision)]


class Repositories:
    """All repositories, and the accounts by their tokens."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.tokens: dict[str, str] = {}  # token -> account
        self._all: dict[str, Repository] = {}

    def create(self, name: str, *, owner: str | None = None, is_private: bool = False) -> Repository:
        with self.lock:
            self._all[name] = Repository(name, owner or name.partition("/")[0], is_private)
            return self._all[name]

    def exists(self, name: str) -> bool:
        return name in self._all

    def get(self, name: str) -> Repository:
        return self._all[name]

    def put(self, name: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Commit files to a repository, which is made if needed, beside those it has; returns the commit's hash."""
        with self.lock:
            repository = self._all.get(name) or self.create(name)
            before = repository.files(branch if branch in repository.branches else "main")
            made = {
                path: repository.file_of(data, is_lfs=lfs_mode(path, len(data), data)) for path, data in files.items()
            }
            return repository.commit(branch, {**before, **made}, "put")

    def drop(self, name: str, path: str) -> str:
        with self.lock:
            repository = self._all[name]
            left = {each: file for each, file in repository.files("main").items() if each != path}
            return repository.commit("main", left, "drop")

    def account(self, token: str | None) -> str | None:
        if token is not None and token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return None if token is None else self.tokens[token]

    def to_read(self, name: str, account: str | None, *, content: bool = False) -> Repository:
        """Return a repository that an account may read; with `content` its files too, which a gate may close."""
        found = self._all.get(name)
        if found is None or (found.is_private and account != found.owner):
            raise Refused(401 if account is None else 404, "Repository not found", "RepoNotFound")
        if content and found.gated_for is not None and account not in found.gated_for:
            status = 401 if account is None else 403
            raise Refused(
                status, f"Access to model {name} is restricted and you are not in the authorized list.", "GatedRepo"
            )
        return found

    def to_write(self, name: str, account: str | None) -> Repository:
        found = self.to_read(name, account)
        if account != found.owner:
            raise Refused(401 if account is None else 403, "You don't have the required permissions")
        return found


def lfs_mode(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub wants a file as an LFS object."""
    return bool(size) and (path.endswith(LFS_SUFFIXES) or size > INLINE_LIMIT or b"\0" in sample[:512])
