"""The journal: a folder beside the output where a job leaves what it has finished, and finds it again.

.NAME.KEY.weightmill/        KEY names the plan: another plan for the same output has its own folder
    job.json                 what the job is
    lock                     held by the process that works on it
    failed                   in a sweep: it failed, and the others go on without it
    parts/                   files being written, one an attempt
    files/                   finished weight files; with config, index and aux files it becomes the output. A file of
                             several units lies here from the start: they write into it in place
    pieces/                  finished pieces of a file, where several processes make them: put into it at the end
    records/unit-00001.json  one a finished unit, written last: a unit without a valid record is done again
    published.json           the output's report, from before the output has its name until all else here is removed
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.planning.plan import FORMAT, Unit
from loaders.containers.writer import allocate
from loaders.errors import BadCheckpoint, BadSpec, StorageError, io_errors
from loaders.specs import OutputFile
from loaders.stats import CompressionStats, ErrorSums, LoadStats
from loaders.storage.atomic import exclusive, holder, sync_folder, write_file
from loaders.storage.hashes import hash_file

SUFFIX = ".weightmill"
LEFT_OUT = "failed"
PENDING = "published.json"
LOGITS = f".logits{SUFFIX}"  # beside outputs: what their originals compute, for verify=logits


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What became of one tensor. `stored` maps the written tensors' names to (dtype, shape, bytes, xxh3-64)."""

    name: str
    role: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    source_bytes: int
    stored: Mapping[str, tuple[str, tuple[int, ...], int, str]]
    error: ErrorSums

    @property
    def output_bytes(self) -> int:
        return sum(size for _, _, size, _ in self.stored.values())

    @property
    def stats(self) -> CompressionStats:
        return CompressionStats(1, self.error.numel, self.source_bytes, self.output_bytes, self.error)


@dataclass(frozen=True, slots=True)
class Written:
    """A file or piece as a unit finished it."""

    name: str
    size: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Record:
    """What a unit left for a target: its files, its tensors, and what it took."""

    unit: str
    key: str
    files: tuple[Written, ...]
    tensors: tuple[TensorRecord, ...]
    load: LoadStats
    node: str
    attempt: str

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def record_from(document: Mapping[str, Any]) -> Record:
    """Back from JSON.

    Raises:
        BadCheckpoint: of another format version, or not a record.
    """
    if document.get("format") != FORMAT:
        raise BadCheckpoint(
            f"a record of format {document.get('format')}, this weightmill reads {FORMAT};"
            " finish the job with the version that began it, or remove its folder (python -m jobs.clean)"
        )
    try:
        tensors = tuple(
            TensorRecord(
                **{
                    **row,
                    "shape": tuple(row["shape"]),
                    "stored": {name: (d, tuple(s), n, x) for name, (d, s, n, x) in row["stored"].items()},
                    "error": ErrorSums(**row["error"]),
                }
            )
            for row in document["tensors"]
        )
        files = tuple(Written(**row) for row in document["files"])
        rest = {key: value for key, value in document.items() if key not in ("format", "files", "tensors", "load")}
        return Record(**rest, files=files, tensors=tensors, load=LoadStats(**document["load"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"not a record ({type(error).__name__}: {error})") from None


class Journal:
    """The folder of one job and target."""

    def __init__(self, output: Path, key: str) -> None:
        self.output = output
        self.key = key
        self.root = output.parent / f".{output.name}.{key[:12]}{SUFFIX}"
        self.files = self.root / "files"
        self.parts = self.root / "parts"
        self.pieces = self.root / "pieces"
        self.records = self.root / "records"

    @contextmanager
    def hold(self, job: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Raises:
            BadSpec: another process works on this job, or another version began it.
            StorageError: the folder cannot be made.
        """
        with io_errors("making", self.root):
            for folder in (self.files, self.parts, self.pieces, self.records):
                folder.mkdir(parents=True, exist_ok=True)
        with exclusive(self.root / "lock") as is_held:
            if not is_held:
                raise BadSpec(
                    f"output.path: another process ({holder(self.root / 'lock')}) is writing {self.output} right now;"
                    " wait for it, or choose another path"
                )
            self._check_version()
            write_file(self.root / "job.json", json.dumps({"format": FORMAT, **job}, indent=2).encode())
            self._remove_leftovers()
            yield

    def _check_version(self) -> None:
        path = self.root / "job.json"
        if not path.exists():
            return
        with suppress(ValueError, AttributeError):
            found = json.loads(path.read_bytes()).get("format")
            if found != FORMAT:
                raise BadSpec(
                    f"output.path: {self.root} is of format {found}, this weightmill writes {FORMAT}; finish it with"
                    " the version that began it, or remove it (python -m jobs.clean)"
                )

    @property
    def is_left_out(self) -> bool:
        """Whether the job failed while others go on: units begun from now on leave it out."""
        return (self.root / LEFT_OUT).exists()

    def leave_out(self) -> None:
        (self.root / LEFT_OUT).touch()

    def _remove_leftovers(self) -> None:
        (self.root / LEFT_OUT).unlink(missing_ok=True)
        for path in self.parts.iterdir():
            with io_errors("removing", path):
                path.unlink()

    def place(self, file: OutputFile) -> Path:
        """Where a file or piece that is made apart goes when it is finished."""
        return (self.pieces if file.within is not None else self.files) / file.name

    def find(self, file: OutputFile) -> tuple[Path, int]:
        """Where a finished file or piece lies: a path, and its first byte there."""
        apart = self.place(file)
        if file.within is None or apart.exists():
            return apart, 0
        return self.files / file.within[0], file.within[1]

    def make_shared(self, file: OutputFile) -> None:
        """Take all the room of a file that units write in place; what they wrote into it before stays.

        Raises:
            StorageError: the disk is too full, ...
        """
        path = self.files / file.name
        with io_errors(f"taking {file.size} bytes for", path):
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                allocate(descriptor, file.size)
            finally:
                os.close(descriptor)
            sync_folder(self.files)

    @property
    def taken_bytes(self) -> int:
        """What the finished and begun files take of the disk."""
        found = [path.stat() for folder in (self.files, self.pieces) for path in folder.rglob("*") if path.is_file()]
        return sum(min(stat.st_size, stat.st_blocks * 512) for stat in found)

    def add(self, record: Record) -> None:
        """A unit's last act: from now on it is done."""
        document = json.dumps(record.to_json(), separators=(",", ":")).encode()
        write_file(self.records / f"{record.unit}.json", document)

    def done(self, unit: Unit, target: str) -> Record | None:
        """The unit's record, if it is of this work and its file is there, byte for byte.

        Raises:
            BadCheckpoint: the record is of another format version.
        """
        path = self.records / f"{unit.id}.json"
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_bytes())
        except ValueError:
            return None
        record = record_from(document)
        if record.key != unit.key(target):
            return None
        planned, written = unit.outputs[target].files, {row.name: row for row in record.files}
        is_there = all(file.name in written and self._is_there(file, written[file.name]) for file in planned)
        return record if is_there else None

    def _is_there(self, file: OutputFile, written: Written) -> bool:
        path, start = self.find(file)
        if not path.is_file():
            return False
        size = path.stat().st_size
        is_long_enough = size == written.size if start == 0 and file.within is None else size >= start + written.size
        return is_long_enough and hash_file(path, start=start, size=written.size) == written.xxh3

    def has_records(self) -> bool:
        return self.records.is_dir() and any(self.records.iterdir())

    def remove(self) -> None:
        """Forget the job. After a kill within, the same command finishes this as long as `published.json` is there."""
        with suppress(FileNotFoundError):
            for path in [path for path in self.root.iterdir() if path.name != PENDING]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(self.root)


def find_journals(folder: Path, name: str | None = None) -> list[Path]:
    """Journals of the outputs in a folder, or of the one with a name."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{12}}{re.escape(SUFFIX)}")
    return sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name) and p.is_dir())


def is_held(journal: Path) -> bool:
    """Whether a process works on it now."""
    if not (journal / "lock").exists():
        return False
    try:
        with exclusive(journal / "lock") as was_free:
            return not was_free
    except StorageError:
        return True
