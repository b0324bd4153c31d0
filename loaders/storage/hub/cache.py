"""The cache that huggingface_hub keeps on this machine: models--OWNER--NAME/, with refs/, snapshots/COMMIT/ and blobs/.

It is only read here. A file in it is a link to a blob that is named by the file's hash. huggingface_hub documents this
form ("Understand caching"). Its own functions do not serve who is offline: snapshot_download (2.4) refuses a commit of
which the cache has some files only, and scan_cache_dir looks at every file of every repository.
"""

from __future__ import annotations

from pathlib import Path

from loaders.storage.hub.client import COMMIT
from loaders.storage.hub.files import HubFile


def _folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, commit: str) -> Path:
    """Return the folder where the cache has files of a commit, if it has any."""
    return _folder(repo) / "snapshots" / commit


def cached_commit(repo: str, revision: str) -> str | None:
    """Return the commit that a branch or tag was when it was fetched last; None if the cache has no files of it."""
    if ".." in revision.split("/"):
        return None
    place = _folder(repo) / "refs" / revision
    found = place.read_text().strip() if place.is_file() else revision
    return found if COMMIT.fullmatch(found) and snapshot(repo, found).is_dir() else None


def cached_file(file: HubFile) -> Path | None:
    """Return the path of a version of a file in the cache; None if it has none."""
    path = snapshot(file.repo, file.commit) / file.path
    if not path.is_file() or path.stat().st_size != file.size:
        return None
    # Where links are not possible, the cache has copies, whose names do not tell their hashes.
    return path if not path.is_symlink() or path.resolve().name == file.tag else None


def cached_tree(repo: str, commit: str) -> dict[str, HubFile]:
    """Return the files of a commit that the cache has, by their paths, for who cannot ask the Hub."""
    root, found = snapshot(repo, commit), dict[str, HubFile]()
    for path in sorted(each for each in root.rglob("*") if each.is_file()):
        name, status = path.relative_to(root).as_posix(), path.stat()
        tag = path.resolve().name if path.is_symlink() else f"{status.st_size}-{status.st_mtime_ns}"
        found[name] = HubFile(repo, commit, name, status.st_size, tag)
    return found
