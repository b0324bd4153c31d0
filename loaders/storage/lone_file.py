"""One weight file of a store, its shards if it is one of several, and what lies beside it that holds no weights."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from loaders.errors import io_errors
from loaders.storage.address import Address
from loaders.storage.base import OUR_PAGE, OUR_REPORT, Entry, Range, Store

# The weights that are read here, and the indexes and manifests that would say which of them to read.
SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
AT_ONCE = 16  # shards that are looked for at once
# What an engine reads beside weights: configs, tokenizers, templates. Vocabularies of 250,000 tokens take 35 MB.
SMALL, LARGEST = (".json", ".model", ".txt", ".jinja", ".tiktoken"), 64 << 20
ABOUT = re.compile(r"(readme|licen[cs]e|notice)([._-].*)?", re.IGNORECASE)  # what people read about a model


class LoneFile(Store):
    """A `Store` of one weight file, and of what engines and people read beside one.

    The folder may be anything, of downloads for instance: nothing else in it is seen.
    """

    def __init__(self, folder: Store, name: str) -> None:
        self._folder = folder
        self._name = name

    @property
    def address(self) -> Address:
        return self._folder.address / self._name

    @property
    def is_local(self) -> bool:
        return self._folder.is_local

    def _is_shown(self, name: str) -> bool:
        if name == self._name:
            return True
        if name.endswith(SUFFIXES):
            mine, other = SHARD.fullmatch(self._name), SHARD.fullmatch(name)
            return mine is not None and other is not None and mine.groups() == other.groups()
        if "/" in name or name.endswith(".index.json") or name in (OUR_REPORT, OUR_PAGE):
            return False
        return PurePosixPath(name).suffix in SMALL or ABOUT.fullmatch(name) is not None

    def _set(self) -> Sequence[str]:
        """Return the names of the file and its other shards."""
        if (mine := SHARD.fullmatch(self._name)) is None:
            return (self._name,)
        stem, count, suffix = mine.groups()
        return [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        found = {entry for entry in self._folder.list(deep=False, every=every) if self._is_shown(entry.name)}
        # Where nothing can be listed, a folder's files are those with the usual names.
        if all(entry.name != self._name for entry in found):
            with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="find") as pool:
                found |= {entry for entry in pool.map(self._folder.find, self._set()) if entry is not None}
        return tuple(sorted(found))

    def find(self, name: str) -> Entry | None:
        return self._folder.find(name) if self._is_shown(name) else None

    def check_inside(self, name: str, *, may_leave: bool = False) -> str | None:
        # The file itself was named by who asked for it, and may be a link to anywhere.
        return None if name == self._name else self._folder.check_inside(name, may_leave=may_leave)

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        return self._folder.read(entry, start, stop)

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        return self._folder.read_ranges(entry, ranges)

    def check_unchanged(self, entry: Entry) -> None:
        self._folder.check_unchanged(entry)

    def local_path(self, name: str) -> Path | None:
        return self._folder.local_path(name)

    def alone(self) -> tempfile.TemporaryDirectory[str]:
        """Make a folder in which nothing else is: links to the weights, copies of the small files beside them.

        It is for engines, which read folders, and goes with the object that is returned.

        Raises:
            StorageError: it cannot be made.
        """
        made = tempfile.TemporaryDirectory(prefix="weightmill-alone-", ignore_cleanup_errors=True)
        for entry in self.list(deep=False):
            path, place = self.local_path(entry.name), Path(made.name) / entry.name
            assert path is not None
            with io_errors("making", place):
                if entry.name in self._set():
                    place.symlink_to(os.path.abspath(path))
                elif entry.size <= LARGEST:
                    shutil.copyfile(path, place)
        return made
