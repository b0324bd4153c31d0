"""The journal of a job, next to its output: a record of finished work, from which an interrupted job resumes.

job.json                 the job's request
failed                   in a sweep: the job failed, and the others go on without it
files/ pieces/           finished files, and pieces of a file that several processes write: see `Destination`
records/unit-00001.json  one per finished unit, written last: a unit without a valid record is done again
published.json           the output's report, written just before publishing, and removed with the journal
life.json                what the driver said of itself last: see life.py
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from jobs.cli.program import program
from jobs.cli.verb import note
from jobs.planning.plan import FORMAT, Unit
from loaders.errors import BadSpec, StorageError, VerifyFailed
from loaders.specs import OutputFile
from loaders.stats import ErrorSums, LoadStats
from loaders.storage import destination_at
from loaders.storage.address import Address
from loaders.storage.base import Entry
from loaders.storage.hashes import opened, sealed, unsealed

LEFT_OUT = "failed"
PENDING = "published.json"
LIFE = "life.json"
LOGITS = ".logits.weightmill"  # the folder, next to outputs, of the originals' logits for verify=logits
WrittenTensor = tuple[str, tuple[int, ...], int, str]  # dtype, shape, bytes, xxh3-64


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """The record of one tensor. `stored` has the tensors that were written for it, by name."""

    name: str
    role: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    source_bytes: int
    stored: Mapping[str, WrittenTensor]
    error: ErrorSums
    backend: str = "cpu"  # on which it was encoded

    @property
    def output_bytes(self) -> int:
        return sum(size for _, _, size, _ in self.stored.values())


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file or piece: its size, xxh3-128, and the tag of its version in the destination."""

    name: str
    size: int
    xxh3: str
    tag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a job holds of a finished unit; its tensors stay in its record, so that a large model takes no memory."""

    unit: str
    files: tuple[Written, ...]
    output_bytes: int
    load: LoadStats
    node: str
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of a finished unit for one target: its files, its tensors, and the time and memory it took."""

    unit: str
    key: str
    files: tuple[Written, ...]
    tensors: tuple[TensorRecord, ...]
    load: LoadStats
    node: str
    attempt: str
    backend: str = "cpu"  # what records say that name none, which are older

    def to_bytes(self) -> bytes:
        """Return the record as JSON, of the fields' values as they are: `asdict` would copy all of it."""
        return sealed(to_json(_fields(self), inf_nan_mode="constants"))

    @property
    def done(self) -> Done:
        size = sum(tensor.output_bytes for tensor in self.tensors)
        return Done(
            unit=self.unit,
            files=self.files,
            output_bytes=size,
            load=self.load,
            node=self.node,
            backend=self.backend,
        )


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


RECORD = TypeAdapter(Record)


def record_from(raw: bytes) -> Record | None:
    """Read a record; None if it is damaged, or of another version of weightmill: the unit is then done again."""
    content = opened(raw)
    try:
        return None if content is None else RECORD.validate_json(content, strict=True)
    except ValidationError:
        return None


class Journal:
    """The journal of one job: its unpublished output, and the records of its units."""

    def __init__(self, output: Address, key: str) -> None:
        self.output = output
        self.key = key
        self.destination = destination_at(output, key)

    def __reduce__(self) -> tuple[type[Journal], tuple[Address, str]]:
        # Another process opens the destination itself: the client of a store does not travel.
        return Journal, (self.output, self.key)

    @contextmanager
    def hold(self, job: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
        """Create the journal and exclude other processes from it for the length of the block.

        Raises:
            BadSpec: another process works on this job, or another version began it.
            StorageError: the journal cannot be created.
        """
        with self.destination.claim() as other:
            if other is not None:
                raise BadSpec(
                    f"output.path: another process ({other}) is writing {self.output} right now;"
                    " wait for it, or choose another path"
                )
            self._check_version()
            self.destination.prepare(overwrite=overwrite)
            self.destination.put("job.json", sealed(json.dumps({"format": FORMAT, **job}).encode()))
            # What failed in an earlier sweep is tried again.
            self.destination.drop(LEFT_OUT)
            self.destination.drop(LIFE)
            yield

    def _check_version(self) -> None:
        raw = self.destination.get("job.json")
        # A job.json that is damaged has no version. It is replaced; units' records are read by themselves.
        with suppress(ValueError, AttributeError):
            found = FORMAT if raw is None else (unsealed(raw) or {}).get("format", FORMAT)
            if found != FORMAT:
                raise BadSpec(
                    f"output.path: {self.destination.journal} is of format {found}, this weightmill writes {FORMAT};"
                    f" finish it with the version that began it, or remove it ({program()} clean delete=true)"
                )

    def check_there(self) -> None:
        """Check that this process sees the journal, which the driver has made.

        Raises:
            StorageError: it does not.
        """
        if not self.destination.is_there():
            raise StorageError(
                f"{self.destination.journal}: not found on {socket.gethostname()};"
                " on several machines the output must lie where all of them reach it, and of one on the Hub its"
                " output.journal"
            )

    @property
    def is_left_out(self) -> bool:
        """Whether the job failed while others of its sweep go on; later units then leave it out."""
        return self.destination.get(LEFT_OUT) is not None

    def leave_out(self) -> None:
        self.destination.put(LEFT_OUT, b"")

    def place(self, file: OutputFile) -> str:
        """Return the name that a file, or a piece written as a file of its own, has once it is finished."""
        return f"{'files' if file.within is None else 'pieces'}/{file.name}"

    def find(self, file: OutputFile) -> tuple[str, int, Entry | None]:
        """Find a finished file or piece: the name of the file that holds it, its first byte there, and the entry."""
        if file.within is None:
            return self.place(file), 0, self.destination.files.find(file.name)
        # A piece that is a file of its own is not in the shared file yet, whatever that has at its place.
        if (apart := self.destination.pieces.find(file.name)) is not None:
            return self.place(file), 0, apart
        whole, start = file.within
        return f"files/{whole}", start, self.destination.files.find(whole)

    @property
    def taken_bytes(self) -> int:
        """The bytes that finished and shared files take in the destination."""
        return sum(entry.size for area in ("files", "pieces") for entry in self.destination.list(area))

    def add(self, record: Record) -> None:
        """Write a unit's record. This is the unit's last step, after which it counts as done."""
        self.destination.put(f"records/{record.unit}.json", record.to_bytes())

    def record(self, unit: Unit) -> Record | None:
        """Return a unit's record as it is now; None if there is none that is whole."""
        raw = self.destination.get(f"records/{unit.id}.json")
        return None if raw is None else record_from(raw)

    def tensors(self, units: Iterable[Unit]) -> Iterator[TensorRecord]:
        """Yield the tensors of finished units, of which one unit's are in memory at a time.

        Raises:
            VerifyFailed: a unit's record is gone, or damaged.
        """
        for unit in units:
            found = self._found(unit)
            if found is None:
                raise VerifyFailed(f"{self._place(unit)}: it is gone, or damaged; run the same command again")
            yield from found.tensors

    def _place(self, unit: Unit) -> Address:
        return self.destination.journal / f"records/{unit.id}.json"

    def _found(self, unit: Unit) -> Record | None:
        """Return a unit's record, if there is one that is whole; a crash may leave a file without its bytes."""
        found = self.record(unit)
        if found is None and self.destination.get(f"records/{unit.id}.json") is not None:
            note(f"{self._place(unit)}: it is damaged, or of another version; {unit.id} is done again")
        return found

    def done(self, unit: Unit, target: str) -> Done | None:
        """Return what its record says of a unit, if it is of this very work and its files are intact; else None."""
        record = self._found(unit)
        if record is None or record.key != unit.key(target):
            return None
        planned, written = unit.outputs[target].files, {row.name: row for row in record.files}
        is_there = all(file.name in written and self._is_there(file, written[file.name]) for file in planned)
        return record.done if is_there else None

    def _is_there(self, file: OutputFile, written: Written) -> bool:
        name, start, found = self.find(file)
        entry = Entry(name, written.size, written.tag)
        is_range = name.startswith("files/") and file.within is not None
        return found is not None and self.destination.holds(entry, written.xxh3, start if is_range else None)

    @property
    def count(self) -> int:
        """The number of records."""
        return len(self.destination.list("records"))

    def remove(self) -> None:
        """Remove the journal."""
        # What is newest goes last, which is to be what says how far the job had come.
        self.destination.drop(LIFE)
        self.destination.forget()

    def remove_empty(self) -> None:
        """Remove what a kill at the end of `remove` left."""
        self.destination.forget_empty()
