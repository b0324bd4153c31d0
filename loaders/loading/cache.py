"""A cache on disk of quantized, cast and decoded weights. The key is a digest of the source's content and the request.

An entry is a safetensors file of bytes and a JSON file that describes it, which is written after it. Both are written
atomically, and only one process makes an entry while others wait for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from loaders.errors import BadCheckpoint, StorageError, io_errors
from loaders.storage.atomic import atomic_writer, file_lock, write_file
from loaders.storage.base import PinnedFiles
from loaders.storage.folder import Folder
from loaders.storage.hashes import hash_file, sealed, text_digest, unsealed

FORMAT = 3  # of the entries' files; one of another format counts as missing
ALIGN = 64  # bytes: the data begin at a multiple of it, so that no part is misaligned in a map of the file


@dataclass(frozen=True, slots=True)
class CachedParts:
    """An entry: its parts by name, each uint8 (bytes,) in a private map of the file, and the caller's description."""

    parts: Mapping[str, np.ndarray]
    about: Mapping[str, Any]


class WeightCache:
    """A folder of cache entries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def size_bytes(self) -> int:
        """The bytes of all its files."""
        return sum(path.stat().st_size for path in self._files())

    def keys(self) -> tuple[str, ...]:
        """Return the keys of the complete entries."""
        return tuple(path.stem for path in self._files() if path.suffix == ".json")

    def content_of(self, files: PinnedFiles, name: str) -> str:
        """Return a digest of a file's content: the xxh3-128 of a local file, or the version tag of another store.

        A local file is hashed once; the result is kept under its path, inode, size and times, and used while they stay.

        Raises:
            StorageError: the file cannot be read, or the result cannot be written.
        """
        path = files.store.local_path(name)
        if path is None:
            return text_digest(f"{files.address} {files.entry(name)!r}")
        status = path.stat()
        where = f"{os.path.realpath(path)} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        memo = self.folder / "hashes" / f"{text_digest(where)}.txt"
        # There is no result yet, or it cannot be read: the file is hashed.
        with suppress(OSError):
            found = memo.read_text().strip()
            if len(found) == 32:
                return found
        found = hash_file(path)
        self._make(memo.parent)
        write_file(memo, found.encode())
        return found

    def get(self, key: str) -> CachedParts | None:
        """Return an entry; None if there is none, or if it is damaged or of another format."""
        from loaders.containers.safetensors import read_specs
        from loaders.strategies.lazy import map_file

        data, about = self._paths(key)
        try:
            said = unsealed(about.read_bytes())
            if said is None or said["format"] != FORMAT or data.stat().st_size != said["bytes"]:
                return None
            whole = map_file(data, private=True)
            specs = read_specs(PinnedFiles(Folder(self.folder)), data.name)
            # A disk may lose bits; to read all of them costs little where all are used.
            if hash_file(data) != said["xxh3"]:
                return None
        # Whatever is wrong with an entry, the caller makes it anew, which costs time but is always right.
        except (OSError, ValueError, KeyError, TypeError, RecursionError, BadCheckpoint, StorageError):
            return None
        parts = {spec.name: whole[spec.offset : spec.offset + spec.size] for spec in specs}
        return CachedParts(parts, said["about"])

    def put(self, key: str, parts: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Write an entry: arrays by name, and a description of JSON values.

        Raises:
            StorageError: it cannot be written: the disk is full, ...
        """
        data, said = self._paths(key)
        self._make(self.folder)
        # Parts with the widest items come first, so that each part begins at a multiple of its item size.
        order = sorted(parts, key=lambda name: -parts[name].itemsize)
        header, at = {}, 0
        for name in order:
            header[name] = {"dtype": "U8", "shape": [parts[name].nbytes], "data_offsets": [at, at + parts[name].nbytes]}
            at += parts[name].nbytes
        raw = json.dumps(header).encode()
        raw += b" " * (-(8 + len(raw)) % ALIGN)
        head, hasher = len(raw).to_bytes(8, "little") + raw, xxhash.xxh3_128()
        pieces: list[bytes | memoryview] = [head]
        pieces += [np.ascontiguousarray(parts[n]).reshape(-1).view(np.uint8).data for n in order]
        with atomic_writer(data) as file:
            for piece in pieces:
                file.write(piece)
                hasher.update(piece)
        # The description comes last: an entry without one, left by a crash, counts as missing.
        document = {"format": FORMAT, "bytes": len(head) + at, "xxh3": hasher.hexdigest(), "about": dict(about)}
        write_file(said, sealed(json.dumps(document).encode()))

    @contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Hold the lock of an entry while it is made. A process that waited for it must look the entry up again."""
        self._make(self.folder)
        with file_lock(self._paths(key)[0]):
            yield

    def clear(self) -> int:
        """Remove all entries, complete or not. Weights that were loaded from one stay valid: their map keeps the file.

        Returns:
            The bytes that were freed.

        Raises:
            StorageError: a file cannot be removed.
        """
        freed = 0
        for path in self._files():
            # Another process removed it first.
            with io_errors("removing", path), suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                freed += size
        return freed

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.safetensors", self.folder / f"{key}.json"

    def _files(self) -> Sequence[Path]:
        """List the files that the cache made, by their names: a user may have put other files into the folder."""
        made = [
            *self.folder.glob("*.json"),
            *self.folder.glob("*.safetensors"),
            *(self.folder / "hashes").glob("*.txt"),
        ]
        return sorted(path for path in made if len(path.stem) == 32 and set(path.stem) <= set("0123456789abcdef"))

    def _make(self, folder: Path) -> None:
        with io_errors("making", folder):
            folder.mkdir(parents=True, exist_ok=True)
