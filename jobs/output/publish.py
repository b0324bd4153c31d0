"""Making an output visible: aux files, index and config beside the weights, then one rename of the folder.

A checkpoint exists once its folder has its name. Until then it is the journal's `files/`; what stood there before, if
it may be replaced, changes places with it in one step where the system can.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.output.join import join
from jobs.output.journal import PENDING, Journal, Record
from jobs.output.report import Report, WeightFile, files_named
from jobs.planning.plan import Plan, TargetPlan
from loaders.checkpoints.aux_files import OUR_REPORT
from loaders.errors import BadSpec, VerifyFailed, io_errors
from loaders.storage.atomic import sync_folder, write_file
from loaders.storage.hashes import hash_file
from loaders.storage.json_files import json_bytes

RENAME_EXCHANGE = 2
AT_FDCWD = -100


@dataclass(frozen=True, slots=True)
class Completed:
    """The files of an output: the xxh3-128 of those beside the weights, and the report's rows of weight files."""

    aux: dict[str, str]
    weights: tuple[WeightFile, ...]


def complete(plan: Plan, target: TargetPlan, journal: Journal, records: Sequence[Record]) -> Completed:
    """Join what is to be one file, and put everything but the report beside the finished weight files.

    Raises:
        VerifyFailed: a weight file is not what its record says.
        StorageError: ...
    """
    _check_files(target, journal, records)
    made: dict[str, bytes] = dict(target.made)
    stored_bytes = sum(t.output_bytes for record in records for t in record.tensors)
    index = target.target.layout.index(target.files, stored_bytes, target.parameters)
    if index is not None:
        made[target.target.container.index] = json_bytes(index)
    if target.config is not None:
        made["config.json"] = json_bytes(target.config)
    apart = {file.name for file in target.files if file.within is None}
    written = [file for record in records for file in record.files if file.name in apart]
    weights = [WeightFile(name=file.name, bytes=file.size, xxh3=file.xxh3) for file in written]
    if target.assembly is not None:
        made |= target.assembly.made
        if target.assembly.joined is not None:
            weights = [join(target.assembly.joined, target.pieces, journal, records), *weights]
    copied = [name for name in plan.aux_of(target) if name not in made]
    for name in copied:
        _copy(plan.checkpoint.root / name, journal.files / name)
    _remove_others(journal.files, {*made, *copied, *(file.name for file in target.finals), OUR_REPORT})
    for name, data in made.items():
        (journal.files / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(journal.files / name, data)
    return Completed({name: hash_file(journal.files / name) for name in (*copied, *made)}, tuple(weights))


def _check_files(target: TargetPlan, journal: Journal, records: Sequence[Record]) -> None:
    """Every planned file is there, as long as its record says (records of earlier runs were hashed when taken up)."""
    sizes = {file.name: file.size for record in records for file in record.files}
    for file in target.files:
        path, start = journal.find(file)
        size = path.stat().st_size if path.is_file() else None
        if size is not None and path.parent != journal.pieces and file.within is not None:
            size = min(size - start, sizes.get(file.name, 0))  # in place, between others
        slack = file.size - (size or 0)
        if size is None or size != sizes.get(file.name) or slack < 0:
            raise VerifyFailed(
                f"{path}: expected {sizes.get(file.name)} bytes, found {size}; run the same command again"
            )


def _copy(source: Path, target: Path) -> None:
    with io_errors("copying", source):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        shutil.copymode(source, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)


def _remove_others(folder: Path, wanted: set[str]) -> None:
    """What an interrupted attempt left."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in wanted:
            with io_errors("removing", path):
                path.unlink()


def publish(journal: Journal, report: Report, *, overwrite: bool) -> None:
    """Give the output its name.

    Raises:
        BadSpec: something else stands there by now.
        StorageError: it cannot be renamed.
    """
    document = report.to_bytes()
    write_file(journal.files / OUR_REPORT, document)
    for folder in [journal.files, *(p for p in journal.files.rglob("*") if p.is_dir())]:
        sync_folder(folder)
    write_file(journal.root / PENDING, document)
    with io_errors("publishing", journal.output):
        if not journal.output.exists():
            journal.files.rename(journal.output)
        elif overwrite:
            check_replaceable(journal.output)
            _exchange(journal.files, journal.output)
        else:
            raise BadSpec(f"output.path: {journal.output} came into being while the job ran; output.overwrite=true")
        sync_folder(journal.output.parent)


def is_published(journal: Journal) -> bool:
    """Whether this very journal's output has its name already: only cleaning up was left."""
    pending, report = journal.root / PENDING, journal.output / OUR_REPORT
    return pending.is_file() and report.is_file() and pending.read_bytes() == report.read_bytes()


def check_replaceable(output: Path) -> None:
    """Raises BadSpec: only an empty folder or an earlier output is ever replaced."""
    if output.is_symlink() or not output.is_dir():
        raise BadSpec(f"output.path: {output} is no folder; choose another path")
    if any(output.iterdir()) and not (output / OUR_REPORT).is_file():
        raise BadSpec(
            f"output.path: {output} holds files that weightmill did not write (there is no {OUR_REPORT});"
            " output.overwrite=true replaces only its own outputs; choose another path"
        )
    others = files_of_others(output)
    if others:
        raise BadSpec(
            f"output.path: {output} holds {len(others)} files that weightmill did not write, {others[0]} first;"
            " output.overwrite=true would remove them: move them away, or choose another path"
        )


def files_of_others(output: Path) -> list[str]:
    """Files in an output that its report does not name, by their paths in it."""
    if not (output / OUR_REPORT).is_file():
        return []
    ours = files_named(output)
    found = (path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name not in ours)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step, or, where the system cannot, in two."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            done = libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE)
            if done == 0:
                return
            if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    aside = new.with_name("replaced")
    if aside.exists():
        shutil.rmtree(aside)
    old.rename(aside)
    new.rename(old)
