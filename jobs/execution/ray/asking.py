"""What a machine is asked before it gets work: what it runs, and whether it sees the source and the output."""

from __future__ import annotations

import platform
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jobs.execution.cluster import Task
from jobs.output.journal import Journal
from loaders.backends import check_backend
from loaders.errors import StorageError, WeightmillError
from loaders.places import code_digest
from loaders.storage import open_source
from loaders.storage.address import Address
from loaders.storage.atomic import TEMPORARY
from loaders.storage.base import LOOKS, Entry, Store
from loaders.storage.local import free_bytes
from loaders.storage.settings import StoreSettings, current, use
from loaders.storage.times import modified
from loaders.words import size

MOST_FILES = 1000  # files of a source that a machine looks at; of more, as many evenly spaced ones
# Clients of NFS keep what they know of a file for 3 seconds at least (acregmin of nfs(5)).
AGAIN_S = 4.0
WRITTEN_BYTES = 1 << 16  # that a machine writes to the output: enough to fail where no block is free


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a process runs on. Versions are empty where a package is not installed."""

    python: str = field(default_factory=platform.python_version)
    numba: str = field(default_factory=lambda: _version("numba"))
    numpy: str = field(default_factory=lambda: _version("numpy"))
    code: str = field(default_factory=code_digest)  # of weightmill
    architecture: str = field(default_factory=platform.machine)
    clock_s: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a machine is asked. It goes to each one, so a job's many tasks are not in it, but one of them."""

    task: Task[Any]
    files: tuple[Entry, ...]  # of the source, as they were planned for
    outputs: tuple[tuple[Address, str], ...]  # the address and the key of each journal, which opens stores
    name: str  # of a file that the driver leaves in each journal, with `token` in it
    token: bytes
    scratch_bytes: int  # that a unit needs in the scratch folder
    backend: str = "cpu"  # that the machine must have


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a machine answers: what it runs, why it cannot work (else ""), and the name of what it wrote."""

    facts: Facts
    fault: str = ""
    wrote: str = ""


def look_remotely(question: Question, settings: StoreSettings) -> Answer:
    """Answer on a Ray worker, with the driver's settings of stores."""
    use(settings)
    facts = Facts()
    wrote = f"{question.name.removesuffix(TEMPORARY)}-{uuid.uuid4().hex[:12]}{TEMPORARY}"
    try:
        fault = fault_of(question, wrote)
    except (WeightmillError, OSError) as error:
        fault = str(error).replace(f"/{wrote}", "")  # the folder's fault, for which all machines have the same words
    return Answer(facts=facts, fault=fault, wrote=wrote)


def fault_of(question: Question, wrote: str) -> str:
    """Return why this machine cannot do a job's units; an empty text if it can. It writes `wrote` to each journal.

    Raises:
        WeightmillError, OSError: the source cannot be read, or the output cannot be written to.
    """
    if fault := source_fault(open_source(question.task.source), question.files):
        return fault
    check_backend(question.backend)
    question.task.reach()
    for journal in (Journal(output, key) for output, key in question.outputs):
        if not journal.destination.is_there():
            return (
                f"{journal.destination.journal} is not there; on several machines the output must lie where all of them"
                " reach it, and of one on the Hub its output.journal"
            )
        if not again(lambda there=journal: there.destination.get(question.name) == question.token):  # type: ignore[misc]
            return f"{journal.destination.journal} is another folder there than here"
        journal.destination.put(wrote, bytes(WRITTEN_BYTES))
    folder = Path(current().scratch or tempfile.gettempdir())
    if question.scratch_bytes and (free := free_bytes(folder)) < question.scratch_bytes:
        return f"{folder} has {size(free)} free, and a unit needs {size(question.scratch_bytes)} for files on their way"
    return ""


def source_fault(store: Store, files: Sequence[Entry]) -> str:
    """Return which file of the source is another one here; an empty text if none is."""
    with ThreadPoolExecutor(LOOKS) as pool:
        found = pool.map(lambda planned: store.find(planned.name), files)
        others = [planned for planned, now in zip(files, found, strict=True) if now != planned]
    if not others:
        return ""
    first = others[0]
    # A network filesystem may know files as they were a while ago; opening one has most of them ask again.
    if store.is_local:
        with suppress(WeightmillError):
            store.read(first, 0, 0)
        if again(lambda: store.find(first.name) == first):
            return source_fault(store, others[1:])
    return _difference(first, store.find(first.name))


def _difference(planned: Entry, found: Entry | None) -> str:
    if found is None:
        return f"{planned.name} is not in the source there"
    if found.size != planned.size:
        return f"{planned.name} has {found.size} bytes in the source there, {planned.size} here"
    if modified(planned.tag) is not None and modified(planned.tag) == modified(found.tag):
        return f"{planned.name} is a copy there: all machines must read the same file"
    return f"{planned.name} is of another version in the source there"


def again(is_so: Callable[[], bool]) -> bool:
    """Whether something is so, now or within AGAIN_S seconds."""
    deadline = time.monotonic() + AGAIN_S
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def files_of(tasks: Sequence[Task[Any]]) -> tuple[Entry, ...]:
    """Return the files of the source that a job's tasks read, at most MOST_FILES of them."""
    found = sorted({entry for task in tasks for entry in task.unit.sources})
    count = min(MOST_FILES, len(found))
    return tuple(found[index * len(found) // count] for index in range(count))


def journals_of(tasks: Sequence[Task[Any]]) -> list[Journal]:
    """Return the journals that a job's tasks write to, each once."""
    by_address: dict[Address, Journal] = {}
    for task in tasks:
        for journal in task.journals:
            by_address.setdefault(journal.destination.journal, journal)
    return list(by_address.values())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def seen(journals: Sequence[Journal], wrote: str) -> str:
    """Return which journal lacks what a machine wrote there, and remove it from all; an empty text if none does."""
    fault = ""
    for journal in journals:
        if not again(lambda there=journal: len(there.destination.get(wrote) or b"") == WRITTEN_BYTES):  # type: ignore[misc]
            fault = f"what it writes to {journal.destination.journal} is not seen here"
        with suppress(StorageError):
            journal.destination.drop(wrote)
    return fault
