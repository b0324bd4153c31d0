"""The small files of a checkpoint (config, tokenizer) as files of this machine, for libraries that read folders."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint
from loaders.errors import io_errors
from loaders.storage.lone_file import LARGEST, SMALL


@contextmanager
def small_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield a folder with the checkpoint's small files: its own, or a temporary one into which they were fetched.

    Raises:
        StorageError: they cannot be fetched.
    """
    source = checkpoint.source
    if source.store.is_local:
        yield checkpoint.folder(READS_FOLDERS)
        return
    weights = {entry.name for entry in checkpoint.files}
    small = (
        entry.name
        for entry in source.store.list(deep=False)
        if entry.size <= LARGEST and entry.name not in weights and PurePosixPath(entry.name).suffix in SMALL
    )
    with written((name, source.read_all(name, LARGEST)) for name in small) as folder:
        yield folder


@contextmanager
def written(files: Iterable[tuple[str, bytes]]) -> Iterator[Path]:
    """Yield a temporary folder with files of these names and contents.

    Raises:
        StorageError: they cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="weightmill-small-") as made:
        for name, content in files:
            path = Path(made) / name
            with io_errors("writing", path):
                path.write_bytes(content)
        yield Path(made)
