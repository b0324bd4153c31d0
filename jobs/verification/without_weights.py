"""What shows of an output without reading weights: its report, headers, index and auxiliary files against the plan."""

from __future__ import annotations

from jobs.output.card_block import aux_digest
from jobs.output.publish import files_of_others, indexes_of
from jobs.output.report import FileRange, Report, StoredPart, WeightFile, tensor_errors, totals_of
from jobs.planning.plan import Plan
from jobs.planning.targets import TARGET
from loaders.checkpoints.checkpoint import Checkpoint, Headers, open_checkpoint
from loaders.errors import VerifyFailed
from loaders.limits import JSON_REPORT
from loaders.specs import OutputFile, Slot
from loaders.storage.base import OUR_PAGE, OUR_REPORT, PinnedFiles, Store
from loaders.storage.hashes import hash_stored


def range_digest(files: PinnedFiles, name: str, written: FileRange) -> str | None:
    """Return the xxh3-128 of a range of a file; None if the file is too short."""
    entry = files.entry(name)
    if entry.size < written.offset + written.bytes:
        return None
    return hash_stored(files.store, entry, written.offset, written.bytes)


def check_finished(plan: Plan, report: Report, files: Store, headers: Headers) -> None:
    """Check an output that is not published yet as `verify_output` would without reading weights.

    Raises:
        VerifyFailed: its report or its headers do not say what was planned.
    """
    written = open_checkpoint(files, headers=headers)
    if faults := report_faults(plan, written, report) or _header_faults(plan, written):
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise VerifyFailed(f"not published: {faults[0]}{more}; this is a fault of weightmill: please report it")


def report_faults(plan: Plan, written: Checkpoint, report: Report) -> list[str]:
    """List what a report says that is not so, or does not say, of what the plan tells: names, dtypes, shapes, sizes.

    It is looked at first: what follows takes tensors and files from the report by the plan's names.
    """
    recorded = {row.name: row for row in report.tensors}
    placements = {p.name: p for unit in plan.units for p in unit.outputs[TARGET].placements}
    faults = [f"{name}: not the same tensors are in the plan and in it" for name in sorted({*recorded} ^ {*placements})]
    for name in recorded.keys() & placements.keys():
        row, placement = recorded[name], placements[name]
        tensor, slots = placement.encoding.tensor, {slot.name: slot for slot in placement.slots.values()}
        wanted = (tensor.role, placement.encoding.action, tensor.dtype.name, tensor.shape, tensor.source_bytes)
        if (row.role, row.action, row.dtype, row.shape, row.source_bytes) != wanted:
            faults.append(f"{name}: it does not say of the tensor what its source has")
        is_said = row.stored.keys() == slots.keys() and all(_is_said(part, slots[n]) for n, part in row.stored.items())
        if not is_said or row.output_bytes != sum(part.bytes for part in row.stored.values()):
            faults.append(f"{name}: it does not say what is stored for the tensor")
    if len(report.tensors) > len(recorded):
        faults.append("it has a tensor twice")
    if not faults and report.totals != totals_of(report.tensors):
        faults.append("its totals are not those of its tensors")
    ranges = {each.name for file in report.files for each in file.ranges}
    finals = {file.name for file in plan.targets[TARGET].finals}
    parts = {file.name for unit in plan.units for file in unit.outputs[TARGET].files}
    sizes = {file.name: file.bytes for file in report.files}
    if sizes.keys() != finals or not parts <= ranges or len(sizes) < len(report.files):
        faults.append("it does not name the weight files that the plan has")
    files = written.source
    faults += [
        f"{name}: it says {size} bytes, the file has {entry.size}"
        for name, size in sizes.items()
        if name in finals and (entry := files.find(name)) is not None and entry.size != size
    ]
    made_from = [(file.name, file.bytes) for file in report.source.files]
    if made_from != [(entry.name, entry.size) for entry in plan.checkpoint.files]:
        faults.append("it does not name the files of the source")
    return [f"{OUR_REPORT}: {fault}" for fault in faults]


def _is_said(part: StoredPart, slot: Slot) -> bool:
    if slot.is_bound:
        return part.dtype == slot.dtype.name and part.bytes <= slot.size
    return (part.dtype, part.shape, part.bytes) == (slot.dtype.name, slot.shape, slot.size)


def list_faults(plan: Plan, written: Checkpoint, report: Report) -> list[str]:
    """List the faults that show without reading weights: in names, shapes, dtypes, index, report, auxiliary files."""
    found = {spec.name: spec for spec in written.weights}
    files, faults = written.source, _header_faults(plan, written)
    for name, digest in report.aux.items():
        entry = files.find(name)
        if entry is None:
            faults.append(f"{name}: missing from the output")
        elif aux_digest(files.store, entry) != digest:
            faults.append(f"{name}: it is not as it was written")
    faults += [f"{name}: weightmill did not write it" for name in files_of_others(written.address)]
    for row in report.tensors:
        shown = tensor_errors(row.sums)
        wrong = [key for key, value in shown.items() if getattr(row, key) != value]
        faults += [f"{row.name}: {key} in {OUR_REPORT} is not what its sums give" for key in wrong]
    target = plan.targets[TARGET]
    faults += [fault for file in target.finals for fault in _size_faults(files, file)]
    faults += [fault for file in report.files for fault in _tail_faults(files, file)]
    sizes = dict.fromkeys((file.name for file in target.files), 0)
    for spec in found.values():
        sizes[spec.file] = sizes.get(spec.file, 0) + spec.size
    for named, index in indexes_of(plan, target, sum(spec.size for spec in found.values()), sizes).items():
        if files.find(named) is not None and files.read_all(named, JSON_REPORT) != index:
            faults.append(f"{named}: it does not say what the files hold")
    return faults


def page_faults(written: Checkpoint, report: Report) -> list[str]:
    """List what is wrong with the page of an output. Older outputs have none."""
    files, digest = written.source, report.run.page
    entry = files.find(OUR_PAGE) if digest is not None else None
    if digest is None or (entry is not None and hash_stored(files.store, entry) == digest):
        return []
    return [f"{OUR_PAGE}: {'missing from the output' if entry is None else 'it is not as it was written'}"]


def _header_faults(plan: Plan, written: Checkpoint) -> list[str]:
    """List what the headers of the output's files say that is not in the plan, and the other way round."""
    wanted = {slot.name: slot for file in plan.targets[TARGET].files for slot in file.slots}
    found = {spec.name: spec for spec in written.weights}
    faults = [f"{name}: missing from the output" for name in sorted(set(wanted) - set(found))]
    places = {(spec.file, spec.offset, spec.size) for name, spec in found.items() if name in wanted}
    for name in sorted(set(found) - set(wanted)):
        # A tied tensor may have a second name for the same bytes.
        if (found[name].file, found[name].offset, found[name].size) not in places:
            faults.append(f"{name}: in the output, but not planned")
    for name in sorted(set(wanted) & set(found)):
        slot, spec = wanted[name], found[name]
        fits = spec.size <= slot.size if slot.is_bound else spec.shape == slot.shape
        if spec.dtype != slot.dtype or not fits:
            found_is = f"{spec.dtype} {list(spec.shape)} in {spec.file}"
            faults.append(f"{name}: expected {slot.dtype} {list(slot.shape)}, found {found_is}")
    return faults


def _tail_faults(files: PinnedFiles, file: WeightFile) -> list[str]:
    """Check the bytes after the last piece of a file that several units wrote."""
    tail = next((piece for piece in file.ranges if piece.name == f"{file.name}.tail"), None)
    if tail is None or files.find(file.name) is None:
        return []
    is_same = range_digest(files, file.name, tail) == tail.xxh3
    return [] if is_same else [f"{file.name}: what follows its tensors is not as it was written"]


def _size_faults(files: PinnedFiles, file: OutputFile) -> list[str]:
    """Check the size and the header of a file whose container plans both to the byte (packed and GGUF)."""
    if file.container != "packed" and not isinstance(file.about, bytes):
        return []
    entry, head = files.find(file.name), file.about or b""
    if entry is None:
        return [f"{file.name}: missing from the output"]
    is_there = entry.size >= len(head) and bytes(files.read(file.name, 0, len(head))) == head
    found = [] if is_there else [f"{file.name}: its header is not the one that was planned"]
    fits = entry.size == file.size
    return found if fits else [*found, f"{file.name}: expected {file.size} bytes, found {entry.size}"]
