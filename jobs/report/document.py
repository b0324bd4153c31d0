"""Building a job's report from its plan and its records. The model that it fills is in jobs/output/report.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from jobs.output.journal import TensorRecord
from jobs.output.publish import Completed
from jobs.output.report import (
    LintFinding,
    NamedFile,
    Report,
    ReportedAdapter,
    ReportedImatrix,
    ReportedSource,
    ReportedTensor,
    RunReport,
    SourceTag,
    TiedPair,
    totals_of,
)
from jobs.planning.plan import FORMAT, Plan, TargetPlan
from jobs.report.loading import loading_of
from jobs.report.metrics import damage_of
from jobs.spec.job import JobSpec
from loaders.lint import Finding
from loaders.quantization.schemes.ggml import Ggml
from loaders.storage.base import Entry
from loaders.storage.hashes import hash_stored

VERSIONS = ("weightmill", "numpy", "numba", "xxhash")  # the packages that determine the output's bytes
# Parts of a request that do not change the result: two jobs that differ only in these make the same output.
NOT_OF_THE_RESULT = ("output", "strategy", "store", "cluster", "tracking", "lint", "objective", "format",
                     "columns")  # fmt: skip


def make_report(
    spec: JobSpec, plan: Plan, target: TargetPlan, records: Iterable[TensorRecord], completed: Completed,
    lint: Callable[[Sequence[ReportedTensor]], Sequence[Finding]], about: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
) -> Report:  # fmt: skip
    """Make the report of a finished target. `about` has the fields of its `run`, except the request.

    Raises:
        VerifyFailed: as `lint`, which is given the tensors' entries.
    """
    tensors = tuple(ReportedTensor.of(record) for record in records)
    found, totals = lint(tensors), totals_of(tensors)
    return Report(
        format=FORMAT,
        job=job_document(spec),
        source=source_of(plan),
        adapter=adapter_of(plan),
        imatrix=imatrix_of(target),
        totals=totals,
        files=completed.weights,
        aux=dict(sorted(completed.aux.items())),
        aux_bytes=completed.aux_bytes,
        tied=tuple(TiedPair(kept=kept, tied=tied) for kept, tied in plan.sources.tied),
        warnings=(*plan.checkpoint.notes, *plan.sources.notes, *target.warnings, *_let_pass(tensors)),
        lint=tuple(LintFinding(**asdict(finding)) for finding in found),
        tensors=tensors,
        versions=versions(),
        quality=None if quality is None else dict(quality),
        damage=damage_of(tensors, totals, loading_of(plan, target).engine, quality),
        run=RunReport(**about, request=spec.resolved(), tags=tags_of(plan)),
    )


def job_document(spec: JobSpec) -> dict[str, Any]:
    """Return the resolved request without the settings that cannot change the result."""
    return {key: value for key, value in spec.resolved().items() if key not in NOT_OF_THE_RESULT}


def _let_pass(tensors: Sequence[ReportedTensor]) -> list[str]:
    """Return a warning about all tensors with NaN or infinities that verify.allow_nonfinite accepted."""
    found = [tensor for tensor in tensors if tensor.sums.nonfinite]
    if not found:
        return []
    total = sum(tensor.sums.nonfinite for tensor in found)
    more = sum(tensor.sums.nonfinite_decoded for tensor in found)
    taken = f", and {more} more that share a scale with them" if more else ""
    who = found[0].name if len(found) == 1 else f"{len(found)} tensors ({found[0].name} first)"
    return [f"{who}: {total} weights are NaN or infinite in the source{taken}: let pass"]


def source_of(plan: Plan) -> ReportedSource:
    """Describe the checkpoint that a plan reads."""
    checkpoint = plan.checkpoint
    return ReportedSource(
        path=str(checkpoint.address),
        fingerprint=checkpoint.fingerprint,
        container=checkpoint.container,
        model_type=checkpoint.config.get("model_type"),
        family=checkpoint.family.name,
        files=tuple(NamedFile(name=tag.name, bytes=tag.size) for tag in checkpoint.files),
    )


def tags_of(plan: Plan) -> tuple[SourceTag, ...]:
    """Describe the versions of the files that an output is made of."""
    checkpoint = plan.checkpoint
    weights = {entry.name for entry in checkpoint.files}

    def tag(entry: Entry) -> SourceTag:
        is_time = checkpoint.source.store.is_local and entry.name not in weights
        digest = hash_stored(checkpoint.source.store, entry) if is_time else None
        return SourceTag(name=entry.name, bytes=entry.size, tag=entry.tag, xxh3=digest)

    return tuple(map(tag, checkpoint.made_of))


def adapter_of(plan: Plan) -> ReportedAdapter | None:
    """Describe the adapter that a plan merges, if it merges one."""
    file = plan.sources.adapter
    if file is None:
        return None
    return ReportedAdapter(
        path=str(file.address),
        name=file.entry.name,
        bytes=file.entry.size,
        xxh3=file.digest,
        tensors=sum(tensor.merge is not None for tensor in plan.sources.tensors),
    )


def imatrix_of(target: TargetPlan) -> ReportedImatrix | None:
    """Describe the importance matrix by which a target is quantized, if there is one."""
    if (matrix := target.imatrix) is None:
        return None
    return ReportedImatrix(
        path=str(matrix.file.address / matrix.file.entry.name),
        bytes=matrix.file.entry.size,
        xxh3=matrix.file.digest,
        entries=len(matrix.sums),
        chunks=matrix.chunks,
        datasets=matrix.datasets,
        tensors=sum(isinstance(d.scheme, Ggml) and d.scheme.is_weighted for d in target.decisions),
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine the output's bytes."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
