"""What a job came to: the document that stays with the output, weightmill.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from jobs.output.journal import Record, TensorRecord
from jobs.output.publish import Completed
from jobs.planning.plan import FORMAT, Plan, TargetPlan
from jobs.spec.job import JobSpec
from loaders.lint import Finding
from loaders.stats import CompressionStats, ErrorSums, LoadStats, finite

VERSIONS = ("weightmill", "numpy", "numba", "xxhash")
NOT_OF_THE_RESULT = ("output", "strategy", "cluster", "tracking", "objective", "format")


@dataclass(frozen=True, slots=True)
class Results:
    """The records of one finished target, added up."""

    records: tuple[Record, ...]

    @property
    def tensors(self) -> tuple[TensorRecord, ...]:
        return tuple(tensor for record in self.records for tensor in record.tensors)

    @property
    def load(self) -> LoadStats:
        return sum((record.load for record in self.records), LoadStats())

    def stats(self, *actions: str) -> CompressionStats:
        """Over all tensors, or over those with one of the actions."""
        return sum((t.stats for t in self.tensors if not actions or t.action in actions), CompressionStats())


def make_document(
    spec: JobSpec,
    plan: Plan,
    target: TargetPlan,
    results: Results,
    completed: Completed,
    found: Sequence[Finding],
    run: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """weightmill.json: all but `run` and `quality`, which machines compute, is the same wherever the job runs."""
    resolved = spec.resolved()
    return {
        "format": FORMAT,
        "job": {key: value for key, value in resolved.items() if key not in NOT_OF_THE_RESULT},
        "source": source_document(plan),
        "totals": totals(results),
        "files": completed.weights,
        "aux": dict(sorted(completed.aux.items())),
        "tied": [{"kept": kept, "tied": tied} for kept, tied in plan.sources.tied],
        "warnings": [*plan.checkpoint.notes, *plan.sources.notes, *target.warnings, *_let_pass(results)],
        "lint": lint_document(found),
        "tensors": [tensor_document(tensor) for tensor in results.tensors],
        "versions": versions(),
        **({} if quality is None else {"quality": quality}),
        "run": {**run, "request": resolved},
    }


def _let_pass(results: Results) -> list[str]:
    """What verify.allow_nonfinite let through."""
    said = []
    for tensor in results.tensors:
        error = tensor.error
        if error.nonfinite:
            taken = (
                f", and {error.nonfinite_decoded} more that share a scale with them" if error.nonfinite_decoded else ""
            )
            said.append(f"{tensor.name}: {error.nonfinite} weights are NaN or infinite in the source{taken}: let pass")
    return said


def source_document(plan: Plan) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    return {
        "path": str(checkpoint.root),
        "fingerprint": checkpoint.fingerprint,
        "container": checkpoint.container,
        "model_type": checkpoint.config.get("model_type"),
        "family": checkpoint.family.name,
        "files": [{"name": tag.name, "bytes": tag.size} for tag in checkpoint.files],
    }


def totals(results: Results) -> dict[str, Any]:
    """Sizes and errors of the whole, and of what was quantized or cast."""
    changed = results.stats("quantize", "cast")
    return {**results.stats().to_json(), "changed": changed.to_json() if changed.tensors else None}


def tensor_errors(error: ErrorSums) -> dict[str, Any]:
    """What follows from a tensor's sums."""
    return {
        "relative_error": finite(error.relative_error),
        "sqnr_db": finite(error.sqnr_db),
        "cosine": error.cosine,
        "max_error": error.max_error,
    }


def tensor_document(tensor: TensorRecord) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "role": tensor.role,
        "action": tensor.action,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "source_bytes": tensor.source_bytes,
        "output_bytes": tensor.output_bytes,
        **tensor_errors(tensor.error),
        "sums": asdict(tensor.error),
        "stored": {
            name: {"dtype": dtype, "shape": list(shape), "bytes": size, "xxh3": digest}
            for name, (dtype, shape, size, digest) in tensor.stored.items()
        },
    }


def versions() -> dict[str, str]:
    """Of what makes the bytes."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def lint_document(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings for machines."""
    return [asdict(finding) for finding in found]
