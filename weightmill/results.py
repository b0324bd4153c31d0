"""What `run`, `plan`, `verify` and the other verbs give a program: records of what the commands print.

`str()` of a result is the command's own text; `document` is what it prints with format=json.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders.errors import VerifyFailed, WeightmillError
from loaders.words import counted

if TYPE_CHECKING:
    from jobs.cli.verb import Said
    from jobs.output.report import Report

WIDTH = 120  # columns of a result's text


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Result:
    """The result of a verb. `notes` are what it said for people while it worked."""

    said: Said = field(repr=False)
    notes: tuple[str, ...]

    @property
    def document(self) -> dict[str, Any]:
        """The result as JSON values, as the command prints it with format=json."""
        return self.said.document

    def __str__(self) -> str:
        from jobs.cli.console import console

        stream = io.StringIO()
        to = console(stream)
        to.width = WIDTH
        to.print(self.said.text, crop=False)
        return stream.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._line()}>"

    def _line(self) -> str:
        return str(self.document.get("status", "done"))


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class JobResult(Result):
    """A finished job.

    output: the address of its output, a text; `path` is the folder. already: whether it was there before, made by the
    same request from the same source. report: what stands in its weightmill.json: `report.totals` has sizes and errors
    of all weights, `report.tensors` those of each. tracked: its run in MLflow, and registered: its version in the
    registry; else None.
    """

    output: str
    already: bool
    report: Report
    tracked: str | None
    registered: str | None

    @property
    def path(self) -> Path:
        """The folder of its output.

        Raises:
            WeightmillError: it lies in a store, which has no folders of this machine.
        """
        from loaders.storage.address import Address

        address = Address.of(self.output)
        if not address.is_local:
            raise WeightmillError(f"path: {self.output} lies in a store; `output` is its address")
        return Path(address.path)

    def _line(self) -> str:
        totals, quant = self.report.totals, self.report.job.get("quant", {}).get("name")
        return (
            f"{self.output}{' (done already)' if self.already else ''}: {quant},"
            f" {totals.bits_per_weight:.3g} bits per weight, relative error {totals.relative_error:.3g}"
        )


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class SweepResult(Result):
    """A finished sweep: the results of its jobs, and the errors of those that failed, by what varies ("quant=nf4")."""

    jobs: Mapping[str, JobResult]
    failures: Mapping[str, WeightmillError]

    def raise_for_failures(self) -> None:
        """Raise the error of the first job that failed, if one did."""
        for name, error in self.failures.items():
            error.add_note(f"job {name}, one of {len(self.failures)} that failed")
            raise error

    def _line(self) -> str:
        failed = f", {len(self.failures)} FAILED: {', '.join(self.failures)}" if self.failures else ""
        return f"{len(self.jobs)} jobs{failed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor of a plan: what becomes of it (quantize, cast, keep, drop), and why; bytes before and afterwards."""

    name: str
    role: str
    action: str
    why: str
    dtype: str
    shape: tuple[int, ...]
    source_bytes: int
    output_bytes: int


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class JobPlan(Result):
    """What a job would do. With quant=auto and without measurements, it says only that: `to_be_measured`, else None."""

    @property
    def to_be_measured(self) -> str | None:
        found = self.document.get("to_be_measured")
        return None if found is None else str(found)

    @property
    def source(self) -> str:
        """The address of the checkpoint."""
        return str(self._of("source")["path"])

    @property
    def output(self) -> str:
        """The address of the output."""
        return str(self._of("output")["path"])

    @property
    def already(self) -> bool:
        """Whether the output is there, made by the same request."""
        return bool(self.document.get("already"))

    @property
    def source_bytes(self) -> int:
        return int(self._of("source")["bytes"])

    @property
    def output_bytes(self) -> int:
        """The bytes of the output's weight files; at most so many."""
        return int(self._of("output")["file_bytes"])

    @property
    def parameters(self) -> int:
        return int(self._of("source")["parameters"])

    @property
    def bits_per_weight(self) -> float:
        return float(self._of("output")["bits_per_weight"])

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        return tuple(
            PlannedTensor(
                **{key: row[key] for key in ("name", "role", "action", "why", "dtype", "source_bytes")},
                shape=tuple(row["shape"]), output_bytes=sum(part["bytes"] for part in row["stored"]),
            )
            for row in self.document.get("tensors", ())
        )  # fmt: skip

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be known before the job runs, with the faults that the engine's own code found."""
        found = [f"{each['what']}; {each['engine']}: {each['happens']}" for each in self.document.get("findings", ())]
        return (*self.document.get("warnings", ()), *found)

    def _of(self, part: str) -> Mapping[str, Any]:
        if self.to_be_measured is not None:
            raise WeightmillError(f"the plan of a mix is known once a job has measured it: {self.to_be_measured}")
        found: Mapping[str, Any] = self.document[part]
        return found

    def _line(self) -> str:
        if self.to_be_measured is not None:
            return self.to_be_measured
        actions = [tensor.action for tensor in self.tensors]
        return (
            f"{self.source} to {self.output}: {actions.count('quantize')} of {len(actions)} tensors quantized,"
            f" {self.source_bytes:,} bytes to {self.output_bytes:,}"
        )


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class StatusResult(Result):
    """How a job or an output stands.

    state: "complete", "running", "silent" (its driver is frozen, or its machine is gone), "stopped" or "failed".
    units_done: of `units`, which is None where that is not known; both are None of what is complete.
    """

    output: str
    state: str
    units_done: int | None
    units: int | None

    @property
    def is_complete(self) -> bool:
        return self.state == "complete"

    def _line(self) -> str:
        units = "" if self.units_done is None else f", {self.units_done} of {self.units or 'some'} units are done"
        return f"{self.output}: {self.state}{units}"


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Checked(Result):
    """What a check of an output found. It is true if there are no faults."""

    output: str
    faults: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        return not self.faults

    def __bool__(self) -> bool:
        return self.is_right

    def raise_for_faults(self) -> None:
        """Raise VerifyFailed if there are faults."""
        if self.faults:
            raise VerifyFailed("\n".join(self.faults))

    def _line(self) -> str:
        if self.faults:
            return f"{self.output}: NOT right, {counted(len(self.faults), 'fault')}, the first: {self.faults[0]}"
        return f"{self.output}: no faults"


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class LintResult(Checked):
    """What an engine will fail on in a checkpoint: `faults`. `document` has the findings, also those that are none.

    bool() of it, and `is_right`, is whether there are no faults.
    """


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class VerifyResult(Checked):
    """What verifying an output found: `faults`, none if every byte and every error is as it was recorded.

    bool() of it, and `is_right`, is whether there are none.

    tensors: how many were decoded and compared. quality: what judging it in its engine measured, if that was asked for.
    """

    source: str
    tensors: int
    quality: Mapping[str, Any] | None

    def _line(self) -> str:
        if self.faults:
            return super()._line()
        return f"{self.output}: {self.tensors} tensors, every byte and every error as recorded"
