"""A branch of a repository of the Hub, to write to: LFS objects are uploaded first, and one commit makes them files."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from loaders.errors import BadSpec, StorageError
from loaders.storage.hub.client import LOG_IN, HubClient, NoRevision, NotThere, http_error, hub, session
from loaders.storage.hub.store import Place
from loaders.storage.settings import current

AT_ONCE = 256  # files in a request that asks about them, as huggingface_hub does
SAMPLE = 512  # the first bytes of a file, by which the Hub tells text from binary
LFS = "application/vnd.git-lfs+json"
STALE = (409, 412)  # the branch is no longer at the parent commit


class HubBranch:
    """One branch, `main` if the address names none."""

    def __init__(self, place: Place) -> None:
        self.repo = place.repo
        self.name = place.revision or "main"
        self._where = str(place.address)

    @property
    def _client(self) -> HubClient:
        return hub()

    def prepare(self, *, is_private: bool) -> str | None:
        """Make the repository if there is none; returns the branch's commit, None if the branch is not there yet.

        Raises:
            BadSpec: nobody is logged in, or the account may not do that, or the repository is public and should not be.
        """
        if not self._client.is_logged_in:
            raise BadSpec(f"{self._where}: writing to the Hub needs a token with write permission: {LOG_IN}")
        try:
            found: Mapping[str, Any] | None = self._client.info(self.repo, None, self._where)
        except NoRevision:
            found = None
        except NotThere:
            self._call(lambda api: api.create_repo(self.repo, private=is_private or None, exist_ok=True))
            found = self._client.info(self.repo, None, self._where)
        if is_private and found is not None and found.get("private") is False:
            raise BadSpec(f"{self._where}: the repository is public; make it private on the Hub, or choose another")
        self.wants_lfs({"config.json": (2, b"{}")})  # which an account without the permission to write cannot ask
        return self.head()

    def head(self) -> str | None:
        """Return the branch's commit; None if there is no such branch."""
        try:
            return str(self._client.info(self.repo, self.name, self._where)["sha"])
        except NoRevision:
            return None

    def create(self) -> str:
        """Make the branch from the first commit of the repository, which has next to nothing; returns that commit."""
        first = str(self._call(lambda api: api.list_repo_commits(self.repo))[-1].commit_id)
        self._call(lambda api: api.create_branch(self.repo, branch=self.name, revision=first, exist_ok=True))
        return first

    def wants_lfs(self, files: Mapping[str, tuple[int, bytes]]) -> Mapping[str, bool]:
        """Ask for each file, given by its size and first bytes, whether it is to be an LFS object.

        Raises:
            BadSpec: the repository's .gitignore leaves one out.
        """
        found: dict[str, bool] = {}
        for names in _batches(list(files)):
            rows = [
                {"path": name, "size": files[name][0], "sample": base64.b64encode(files[name][1][:SAMPLE]).decode()}
                for name in names
            ]
            path = f"/api/models/{self.repo}/preupload/main"
            said = self._client.value(self._where, self._client.ask(self._where, "POST", path, json={"files": rows}))
            for row in _rows(said, "files", self._where):
                if row.get("shouldIgnore"):
                    raise BadSpec(f"{self._where}: the repository's .gitignore leaves out {str(row['path'])[:200]}")
                found[str(row.get("path"))] = row.get("uploadMode") == "lfs"
        if missing := sorted(set(files) - set(found)):
            raise StorageError(f"{self._where}: the Hub does not say how to upload {missing[0]}")
        return found

    def lacks(self, objects: Mapping[str, int]) -> set[str]:
        """Return which LFS objects, sizes by sha256, the repository does not have."""
        left: set[str] = set()
        for names in _batches(sorted(objects)):
            asked = {
                "operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256",
                "objects": [{"oid": name, "size": objects[name]} for name in names],
            }  # fmt: skip
            answer = self._client.ask(
                self._where, "POST", f"/{self.repo}.git/info/lfs/objects/batch", json=asked,
                headers={"Accept": LFS, "Content-Type": LFS},
            )  # fmt: skip
            rows = _rows(self._client.value(self._where, answer), "objects", self._where)
            there = {str(row.get("oid")) for row in rows if not row.get("actions") and not row.get("error")}
            left |= set(names) - there
        return left

    def upload(self, name: str, content: Path | bytes, sha256: str) -> None:
        """Upload an LFS object, unless the Hub has it; it becomes a file by `commit`.

        huggingface_hub uploads it, by Xet where that is installed and the Hub offers it.

        Raises:
            StorageError: the Hub refuses it, or cannot be reached for too long.
        """
        from huggingface_hub import CommitOperationAdd

        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        moved = self._client.traffic

        def send(api: Any) -> None:
            addition = CommitOperationAdd(name, content)
            addition.upload_info.sha256 = bytes.fromhex(sha256)
            with moved.request():
                api.preupload_lfs_files(self.repo, [addition], revision="main", free_memory=False)

        self._call(send, f"{self._where}: uploading {name}")
        moved.moved(uploaded=size)

    def commit(
        self, parent: str, message: str, *, inline: Mapping[str, bytes], objects: Mapping[str, tuple[str, int]],
        deleted: Sequence[str],
    ) -> bool:  # fmt: skip
        """Commit files: `inline` by their bytes, `objects` by sha256 and size. Returns False if the branch has moved.

        huggingface_hub's own `create_commit` wants the bytes of all files, which are no longer here.
        """
        rows: list[tuple[str, Mapping[str, Any]]] = [
            ("header", {"summary": message, "description": "", "parentCommit": parent}),
            *(("deletedFile", {"path": name}) for name in deleted),
            *(
                ("file", {"path": name, "content": base64.b64encode(data).decode(), "encoding": "base64"})
                for name, data in inline.items()
            ),
            *(
                ("lfsFile", {"path": name, "algo": "sha256", "oid": sha256, "size": size})
                for name, (sha256, size) in objects.items()
            ),
        ]
        body = b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in rows)
        answer = self._client.ask(
            self._where, "POST", f"/api/models/{self.repo}/commit/{quote(self.name, safe='')}", also=STALE,
            content=body, headers={"Content-Type": "application/x-ndjson"},
        )  # fmt: skip
        return answer.status_code not in STALE

    def _call(self, call: Callable[[Any], Any], where: str = "") -> Any:
        """Call huggingface_hub's API; errors as `HubClient.ask`."""
        from huggingface_hub import HfApi, utils

        where = where or self._where
        client, http, library = self._client, session(), cast("Any", utils)
        library.disable_progress_bars()  # weightmill has its own
        library.logging.set_verbosity_error()  # its warnings about retries show signed addresses
        if http.timeout.read is None:  # huggingface_hub's default, with which it would wait for ever
            http.timeout = current().timeout_s

        def once() -> Any:
            with _explained(client, where):
                return call(HfApi(endpoint=client.endpoint))

        return client.patient(where, once)


@contextmanager
def _explained(client: HubClient, where: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into ours; their texts may have signed addresses in them."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    # It raises RuntimeError around the errors of an upload, and hf_xet for all of its own; ValueError for answers that
    # are not what they should be.
    except (HfHubHTTPError, RuntimeError, ValueError, http_error()) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, HfHubHTTPError):
                client.check(where, cause.response)
            if isinstance(cause, BadSpec | StorageError):
                raise cause from None
            if isinstance(cause, http_error()):
                with client.failures():
                    raise cause from None
            cause = cause.__cause__
        raise StorageError(
            f"{where}: the Hub's client fails ({type(error).__name__}); run the same command again"
        ) from None


def _rows(said: Any, key: str, where: str) -> list[dict[str, Any]]:
    rows = said.get(key) if isinstance(said, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise StorageError(f"{where}: the Hub's answer has no list of {key}")
    return rows


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[at : at + AT_ONCE] for at in range(0, len(names), AT_ONCE))
