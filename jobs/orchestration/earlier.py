"""What an earlier run left at the output's address: the output that is asked for, or another one, and why.

The same is what was made by the same request, from the same versions of the source's files, by this version of plans,
and whose files are there. Who asks for it again need not wait for it again; what only lacks its judging is only judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jobs.output.journal import Journal
from jobs.output.publish import is_published
from jobs.output.report import Report, read_report
from jobs.planning.plan import Plan
from jobs.planning.targets import TARGET
from jobs.report.document import adapter_of, imatrix_of
from jobs.spec.job import JobSpec
from jobs.spec.names import PLACE
from jobs.verification.logits import asked, faults_of
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, BadSpec, VerifyFailed
from loaders.quantization.gate import Gate
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT
from loaders.storage.hashes import hash_stored

# The parts of a request that decide what is made; of `output`, all but its place. What the backend changes is in the
# key.
OF_THE_RESULT = ("model", "source", "transform", "quant", "unit_mb", "rules", "mtp")
SHOWN = 3  # differences that a message names before it counts the rest


def made_before(spec: JobSpec, plan: Plan, journal: Journal) -> Report | str | None:
    """Return the report of the output that is there already, if it is the one that is asked for; or why it is not.

    None if no output of weightmill is there, or only what an interrupted attempt of this job has to tidy up.
    """
    output = journal.output
    if open_store(output).find(OUR_REPORT) is None or is_published(journal):
        return None
    try:
        report = read_report(output)
    except (BadSpec, BadCheckpoint) as error:
        return str(error).removeprefix("output.path: ")
    if others := [*_other_request(report, spec)]:
        return f"made by another request: {_some(others)}"
    if changed := [*_changed_source(report, plan)]:
        return f"made from another version of the source: {_some(changed)}"
    if lost := [*_lost_files(report, journal)]:
        return f"no longer whole: {_some(lost)}"
    if report.run.key != journal.key:
        made = report.versions.get("weightmill", "another version")
        return f"made in another way than now (by weightmill {made}, on another backend, or of an adapter written anew)"
    return report


def _other_request(report: Report, spec: JobSpec) -> Iterator[str]:
    """Yield what an output was asked for and is not now, a setting each."""

    def parts(request: Mapping[str, Any]) -> dict[str, Any]:
        output = request.get("output")
        form = {key: value for key, value in output.items() if key not in PLACE} if isinstance(output, Mapping) else {}
        return {**{key: request.get(key) for key in OF_THE_RESULT}, "output": form}

    return _differences(parts({**report.run.request, **report.job}), parts(spec.resolved()))


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], place: str = "") -> Iterator[str]:
    if place == "quant." and found.get("name") != wanted.get("name"):
        yield f"quant was {found.get('name')}, now {wanted.get('name')}"
        return
    for key in dict.fromkeys((*wanted, *found)):
        before, now, name = found.get(key), wanted.get(key), f"{place}{key}"
        if before == now:
            continue
        if name == "quant.chosen":
            yield "another mix was chosen"
        elif isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{name}.")
        elif isinstance(before, list | dict) or isinstance(now, list | dict):
            yield f"{name} were others"
        else:
            yield f"{name} was {_shown(before)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _changed_source(report: Report, plan: Plan) -> Iterator[str]:
    """Yield the files of the source that are others than those that an output was made of.

    Tags are compared, and the hashes of files whose tags are only times, where the report has them.
    """
    checkpoint: Checkpoint = plan.checkpoint
    before, now = {tag.name: tag for tag in report.run.tags}, {entry.name: entry for entry in checkpoint.made_of}
    if not before:  # an older report, whose key has the tags of weights
        return
    for name, entry in now.items():
        tag = before.get(name)
        if tag is None:
            yield f"{name} is new"
        elif tag.bytes != entry.size:
            yield f"{name} had {tag.bytes} bytes, now {entry.size}"
        elif tag.tag != entry.tag and (tag.xxh3 is None or hash_stored(checkpoint.source.store, entry) != tag.xxh3):
            yield f"{name} was written anew since"
    yield from (f"{name} is gone" for name in before if name not in now)
    adapter, recorded = adapter_of(plan), report.adapter
    if adapter is not None and recorded is not None and adapter.xxh3 != recorded.xxh3:
        yield f"{adapter.path}/{adapter.name}, which is merged into it, has other bytes"
    imatrix, measured = imatrix_of(plan.targets[TARGET]), report.imatrix
    if imatrix is not None and measured is not None and imatrix.xxh3 != measured.xxh3:
        yield f"{imatrix.path}, the importance matrix, has other bytes"


def _lost_files(report: Report, journal: Journal) -> Iterator[str]:
    """Yield the files of an output that are gone, or have another size than was written."""
    there = {entry.name: entry.size for entry in open_store(journal.output).list(every=True)}
    wanted = {**dict.fromkeys(report.aux), **report.aux_bytes, **{file.name: file.bytes for file in report.files}}
    for name, size in wanted.items():
        if name not in there:
            yield f"{name} is gone"
        elif size is not None and there[name] != size:
            yield f"{name} has {there[name]} bytes, {size} were written"


def _some(reasons: list[str]) -> str:
    more = f", and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return "; ".join(reasons[:SHOWN]) + more


# --- what it lacks


def check_passed(report: Report, spec: JobSpec, plan: Plan, output: Address) -> None:
    """Check that an output passes what is asked for now, as far as its report tells.

    Raises:
        VerifyFailed: a tensor, a finding of lint, or its quality if it was judged as is asked, exceeds a limit.
        BadCheckpoint: its report is none.
    """
    try:
        faults = _faults(report, spec, plan)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{output / OUR_REPORT}: not a report of this version ({error!r})") from None
    if faults:
        more = f" (the first of {len(faults)})" if len(faults) > 1 else ""
        raise VerifyFailed(f"{output} is there, and does not pass: {faults[0]}{more}")


def _faults(report: Report, spec: JobSpec, plan: Plan) -> list[str]:
    recorded, verify, faults = report.job["verify"], spec.verify, list[str]()
    if any(recorded.get(key) != getattr(verify, key) for key in ("allow_nonfinite", "max_relative_error")):
        gate = Gate(verify.allow_nonfinite, verify.max_relative_error)
        schemes = {d.tensor.name: d.scheme for d in plan.targets[TARGET].decisions if d.scheme is not None}
        found = [(row.sums.relative_error, gate.fault(row.name, row.sums, schemes[row.name])) for row in report.tensors]
        faults += [fault for _, fault in sorted(found, key=lambda each: -each[0]) if fault]
    if spec.lint == "fail":
        fatal = [each for each in report.lint if each.level == "fault" and not each.loads_in]
        faults += [f"{f.what}; {f.engine}: {f.happens}; {f.remedy} (lint=warn lets it pass)" for f in fatal]
    if verify.kind != "strict" and report.quality is not None and not lacks_judging(report, spec):
        faults += faults_of(verify, report.quality)
    return faults


def lacks_judging(report: Report, spec: JobSpec) -> bool:
    """Whether a request asks for an evaluation that an output's report has not, or has of other text or settings."""
    if spec.verify.kind == "strict":
        return False
    quality, recorded = report.quality, report.job["verify"]
    if quality is None:
        return True
    return bool(quality.get("asked", asked(recorded)) != asked(spec.verify.model_dump()))
