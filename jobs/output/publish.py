"""Publishing an output: auxiliary files, index, config and report are added to the weights, then all become visible.

Until the last step all files are in the journal. What was at the output's address before, if it may be replaced, is
replaced by that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from jobs.output.card_block import CARD, aux_digest, card_digest
from jobs.output.join import join
from jobs.output.journal import PENDING, Done, Journal
from jobs.output.report import Report, ReportedTensor, WeightFile, files_named
from jobs.planning.plan import Plan, TargetPlan
from loaders.checkpoints.pipeline import MODEL_INDEX
from loaders.containers import safetensors
from loaders.errors import BadSpec, VerifyFailed
from loaders.layouts.base import Joined
from loaders.layouts.diffusers import DiffusersLayout
from loaders.limits import JSON_REPORT
from loaders.specs import OutputFile, WeightSpec
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import OUR_PAGE, OUR_REPORT, Destination
from loaders.storage.copying import copy_into
from loaders.storage.json_files import json_bytes
from loaders.words import counted

Join = Callable[[Joined, Sequence[OutputFile], Journal, Sequence[Done]], WeightFile]


@dataclass(frozen=True, slots=True)
class Completed:
    """The files of a complete output: the xxh3-128 and the bytes of each auxiliary file by name; the weight files."""

    aux: dict[str, str]
    aux_bytes: dict[str, int]
    weights: tuple[WeightFile, ...]


def complete(
    plan: Plan,
    target: TargetPlan,
    journal: Journal,
    done: Sequence[Done],
    *,
    card: bool = False,
    join_by: Join | None = None,
) -> Completed:
    """Join files that several units wrote, and add everything but the report to the finished weight files.

    `join_by` joins them elsewhere than in this process. With `card`, the source's model card is not copied: `put_card`
    writes the output's own.

    Raises:
        VerifyFailed: a weight file is not what its record says.
        StorageError: a file cannot be read or written.
    """
    _check_files(target, journal, done)
    # Readers take an index or a config.json for the sign of a complete checkpoint, so stores without an atomic rename
    # must write these last: they are staged.
    destination, made, signs = journal.destination, dict(target.made), dict[str, bytes]()
    sizes = {file.name: file.size for unit in done for file in unit.files}
    total = sum(unit.output_bytes for unit in done)
    signs |= indexes_of(plan, target, total, {file.name: sizes[file.name] - file.header_bytes for file in target.files})
    if plan.checkpoint.components:
        signs[MODEL_INDEX] = plan.checkpoint.source.read_all(MODEL_INDEX, JSON_REPORT)
    if target.config is not None:
        signs["config.json"] = json_bytes(target.config)
    apart = {file.name for file in target.files if file.within is None}
    written = [file for unit in done for file in unit.files if file.name in apart]
    weights = [WeightFile(name=file.name, bytes=file.size, xxh3=file.xxh3) for file in written]
    if target.assembly is not None:
        made |= target.assembly.made
        if target.assembly.joined is not None:
            weights = [(join_by or join)(target.assembly.joined, target.pieces, journal, done), *weights]
    others = {*made, *signs, *([CARD] if card else [])}
    copied = [name for name in plan.aux_of(target) if name not in others]
    finals = {file.name for file in target.finals}
    _remove_others(destination, {*others, *copied, *finals, OUR_REPORT})
    for name in copied:
        copy_into(destination, plan.checkpoint.source, name)
    for name, data in made.items():
        destination.put(f"files/{name}", data)
    for name, data in signs.items():
        destination.stage(name, data)
    names, files = (*copied, *made, *signs), destination.files
    found = {name: entry for name in names if (entry := files.find(name)) is not None}
    if missing := [name for name in names if name not in found]:
        raise VerifyFailed(f"{missing[0]}: it is gone from {destination.journal}; run the same command again")
    digests = {name: aux_digest(files, entry) for name, entry in found.items()}
    sizes = {name: entry.size for name, entry in sorted(found.items()) if name != CARD}
    return Completed(digests, sizes, tuple(weights))


def put_card(journal: Journal, report: Report, card: bytes) -> Report:
    """Add a model card to an unpublished output; returns the report that names it."""
    journal.destination.put(f"files/{CARD}", card)
    return report.model_copy(update={"aux": dict(sorted({**report.aux, CARD: card_digest(card)}.items()))})


def put_page(journal: Journal, report: Report, page: bytes) -> Report:
    """Add the page to an unpublished output; returns the report that has its hash."""
    journal.destination.put(f"files/{OUR_PAGE}", page)
    return with_page(report, page)


def with_page(report: Report, page: bytes) -> Report:
    """Return a report that names its page by its hash. It stands in `run`, since a page names paths and versions."""
    return report.model_copy(update={"run": report.run.model_copy(update={"page": xxhash.xxh3_128_hexdigest(page)})})


def written_headers(
    files: Sequence[OutputFile], tensors: Iterable[ReportedTensor]
) -> dict[str, tuple[WeightSpec, ...]]:
    """Return what the headers of safetensors files say, by file: they were written by the plan and by these sizes."""
    sizes = {name: part.bytes for tensor in tensors for name, part in tensor.stored.items()}
    found = (file for file in files if file.container == "safetensors")
    return {file.name: safetensors.written_specs(file, safetensors.place(file, sizes)) for file in found}


def indexes_of(plan: Plan, target: TargetPlan, total: int, sizes: Mapping[str, int]) -> dict[str, bytes]:
    """Return an output's indexes by name: mostly one or none, of a pipeline one for each component in several files.

    `total` are the bytes of all tensors, `sizes` those of the tensors in each file that has nothing else in it.
    """
    layout, name = target.target.layout, target.target.container.index
    if isinstance(layout, DiffusersLayout):
        made: Mapping[str, Mapping[str, Any]] = layout.indexes(plan.checkpoint, target.files, sizes)
    else:
        index = layout.index(target.files, total, target.parameters)
        assert index is None or name is not None, "the plan refuses an index that its container does not have"
        made = {} if index is None or name is None else {name: index}
    return {name: json_bytes(index) for name, index in made.items()}


def _check_files(target: TargetPlan, journal: Journal, done: Sequence[Done]) -> None:
    """Check that every planned file exists with the size in its record.

    Hashes were checked when earlier runs' records were taken over, and when this run's files were written.

    Raises:
        VerifyFailed: a file is missing or has another size.
    """
    sizes = {file.name: file.size for unit in done for file in unit.files}
    for file in target.files:
        name, start, entry = journal.find(file)
        size = None if entry is None else entry.size
        if size is not None and file.within is not None and name == f"files/{file.within[0]}":
            # Other pieces follow it in the shared file.
            size = min(size - start, sizes.get(file.name, 0))
        slack = file.size - (size or 0)
        if size is None or size != sizes.get(file.name) or slack < 0:
            raise VerifyFailed(
                f"{journal.destination.journal / name}: expected {sizes.get(file.name)} bytes, found {size};"
                " run the same command again"
            )


def _remove_others(destination: Destination, wanted: set[str]) -> None:
    """Remove files of an interrupted attempt that are not part of the output."""
    for entry in destination.list("files"):
        if entry.name not in wanted:
            destination.drop(f"files/{entry.name}")


def publish(journal: Journal, report: Report, *, overwrite: bool) -> None:
    """Make the output visible.

    Raises:
        BadSpec: something else exists at its address by now.
        StorageError: it cannot be made visible.
    """
    # PENDING comes first: if the process is killed right after publishing, `is_published` finds the same report at the
    # output's address, and the rerun only finishes what is left.
    document = report.to_bytes()
    journal.destination.stage(OUR_REPORT, document)
    journal.destination.put(PENDING, document)
    if overwrite and open_store(journal.output).absence() is None:
        check_replaceable(journal.output)
    try:
        journal.destination.publish(overwrite=overwrite)
    except BadSpec as error:
        raise BadSpec(f"output.path: {error}{'' if overwrite else '; output.overwrite=true replaces it'}") from None


def is_published(journal: Journal) -> bool:
    """Whether the output of this very journal is visible already, so that only removing the journal is left."""
    pending, store = journal.destination.get(PENDING), open_store(journal.output)
    if pending is None or (entry := store.find(OUR_REPORT)) is None:
        return False
    return entry.size == len(pending) and bytes(store.read(entry, 0, entry.size)) == pending


def check_replaceable(output: Address) -> None:
    """Check that what exists at an address may be replaced: an empty folder, or an output of weightmill.

    Raises:
        BadSpec: it is something else, or holds files that weightmill did not write.
    """
    store = open_store(output)
    if store.absence() is not None or store.is_link():
        raise BadSpec(f"output.path: {output} is no folder; choose another path")
    there = store.list(every=True)
    if there and store.find(OUR_REPORT) is None:
        raise BadSpec(
            f"output.path: {output} holds files that weightmill did not write (there is no {OUR_REPORT});"
            " output.overwrite=true replaces only its own outputs; choose another path"
        )
    others = files_of_others(output)
    if others:
        raise BadSpec(
            f"output.path: {output} holds {counted(len(others), 'file')} that weightmill did not write,"
            f" {others[0]} first;"
            " output.overwrite=true would remove them: move them away, or choose another path"
        )


def files_of_others(output: Address) -> list[str]:
    """List the files in an output that its report does not name, by their paths in it."""
    store = open_store(output)
    if store.find(OUR_REPORT) is None:
        return []
    ours = files_named(output)
    return sorted(entry.name for entry in store.list(every=True) if entry.name not in ours)
