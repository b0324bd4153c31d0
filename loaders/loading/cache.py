"""What was made of weights once, kept on disk: by the content of the files and by what was made of them.

An entry is a safetensors file of bytes and, written after it, a JSON file that says what they are. Both appear whole,
and one process makes an entry while others wait for it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import BadCheckpoint, StorageError, io_errors
from loaders.storage.atomic import atomic_writer, file_lock, write_file
from loaders.storage.base import PinnedFiles
from loaders.storage.folder import Folder
from loaders.storage.hashes import hash_file, text_digest

VARIABLE = "WEIGHTMILL_CACHE"
FORMAT = 1
ALIGN = 64


def default_folder() -> Path:
    """$WEIGHTMILL_CACHE, else the platform's place for what can be made again."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "weightmill"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "weightmill"


@dataclass(frozen=True, slots=True)
class CachedParts:
    """Parts by name, flat bytes in a private map of the file, and what was said of them."""

    parts: Mapping[str, np.ndarray]
    about: Mapping[str, Any]


class WeightCache:
    """A folder of entries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self._files())

    def keys(self) -> tuple[str, ...]:
        """Of the entries that are whole."""
        return tuple(path.stem for path in self._files() if path.suffix == ".json")

    def content_of(self, files: PinnedFiles, name: str) -> str:
        """Names a file's content: its xxh3-128, or its version where the store keeps versions apart.

        A file of a folder is read once: as long as its size and times stay, what was found then holds.
        """
        path = files.store.local_path(name)
        if path is None:
            return text_digest(f"{files.address} {files.entry(name)!r}")
        status = path.stat()
        where = f"{os.path.realpath(path)} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        memo = self.folder / "hashes" / f"{text_digest(where)}.txt"
        with suppress(OSError):
            found = memo.read_text().strip()
            if len(found) == 32:
                return found
        found = hash_file(path)
        self._make(memo.parent)
        write_file(memo, found.encode())
        return found

    def get(self, key: str) -> CachedParts | None:
        """An entry, or None. One that is damaged is as if it were not there."""
        from loaders.containers.safetensors import read_specs
        from loaders.strategies.lazy import map_file

        data, about = self._paths(key)
        try:
            said = json.loads(about.read_text())
            if said["format"] != FORMAT or data.stat().st_size != said["bytes"]:
                return None
            whole = map_file(data, private=True)
            specs = read_specs(PinnedFiles(Folder(self.folder)), data.name)
        except (OSError, ValueError, KeyError, TypeError, BadCheckpoint, StorageError):
            return None
        parts = {spec.name: whole[spec.offset : spec.offset + spec.size] for spec in specs}
        return CachedParts(parts, said["about"])

    def put(self, key: str, parts: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Keep an entry.

        Raises:
            StorageError: it cannot be written: the disk is full, ...
        """
        data, said = self._paths(key)
        self._make(self.folder)
        # items as wide as eight bytes first, so that each part begins where its items may
        order = sorted(parts, key=lambda name: -parts[name].itemsize)
        header, at = {}, 0
        for name in order:
            header[name] = {"dtype": "U8", "shape": [parts[name].nbytes], "data_offsets": [at, at + parts[name].nbytes]}
            at += parts[name].nbytes
        raw = json.dumps(header).encode()
        raw += b" " * (-(8 + len(raw)) % ALIGN)
        with atomic_writer(data) as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for name in order:
                file.write(np.ascontiguousarray(parts[name]).reshape(-1).view(np.uint8).data)
        document = {"format": FORMAT, "bytes": 8 + len(raw) + at, "about": dict(about)}
        write_file(said, json.dumps(document).encode())

    @contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Hold the right to make an entry: whoever waits for it finds it made."""
        self._make(self.folder)
        with file_lock(self._paths(key)[0]):
            yield

    def clear(self) -> int:
        """Remove all entries, and what was left of some. Weights that are loaded from one stay.

        Returns:
            Bytes that were freed.
        """
        freed = 0
        for path in self._files():
            with io_errors("removing", path), suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                freed += size
        return freed

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.safetensors", self.folder / f"{key}.json"

    def _files(self) -> Sequence[Path]:
        """Only what it has made itself: the folder may be a person's."""
        made = [
            *self.folder.glob("*.json"),
            *self.folder.glob("*.safetensors"),
            *(self.folder / "hashes").glob("*.txt"),
        ]
        return sorted(path for path in made if len(path.stem) == 32 and set(path.stem) <= set("0123456789abcdef"))

    def _make(self, folder: Path) -> None:
        with io_errors("making", folder):
            folder.mkdir(parents=True, exist_ok=True)
