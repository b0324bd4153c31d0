"""The model of weightmill.json, the report that stays with an output: what the file holds, and reading it back.

jobs/report/document.py builds one of these at the end of a job. A field that older files do not have needs a default,
or a higher FORMAT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError

from jobs.output.damage import Damage, Part
from jobs.output.journal import TensorRecord
from jobs.planning.plan import FORMAT
from loaders.dtypes import dtype_named
from loaders.errors import BadCheckpoint, BadSpec, WeightmillError
from loaders.faults import expected
from loaders.limits import JSON_REPORT, shown
from loaders.stats import CompressionStats, ErrorSums, finite
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import OUR_PAGE, OUR_REPORT, PinnedFiles
from loaders.storage.hashes import digest
from loaders.storage.json_files import read_json


class NamedFile(Part):
    """A file of the source."""

    name: str
    bytes: int


class ReportedSource(Part):
    """The checkpoint that an output was made from. `fingerprint` is `Checkpoint.fingerprint`."""

    path: str
    fingerprint: str
    container: str
    model_type: Any  # as config.json has it
    family: str
    files: tuple[NamedFile, ...]


class ReportedAdapter(Part):
    """The adapter that was merged into the source: the file of its tensors, with its xxh3-128."""

    path: str
    name: str
    bytes: int
    xxh3: str
    tensors: int  # of the source, that it changed


class ReportedImatrix(Part):
    """The importance matrix by which a GGUF was quantized: its file, with its xxh3-128, and what it says of itself."""

    path: str
    bytes: int
    xxh3: str
    entries: int
    chunks: int  # of text that it was made over; 0 where it does not say
    datasets: tuple[str, ...]
    tensors: int  # that were quantized by it


class Changed(Part):
    """The sizes and errors over the tensors that were quantized or cast."""

    tensors: int
    parameters: int
    source_bytes: int
    output_bytes: int
    ratio: float
    bits_per_weight: float
    relative_error: float
    sqnr_db: float | None
    cosine: float


class Totals(Changed):
    """The sizes and errors over all tensors; `changed` covers those that were quantized or cast, None without any."""

    changed: Changed | None


class FileRange(Part):
    """A range of a weight file: the piece that one unit wrote, or the tail after the last piece; with its xxh3-128."""

    name: str
    offset: int
    bytes: int
    xxh3: str


class WeightFile(Part):
    """A weight file of the output with its xxh3-128. `pieces` are its ranges, if several units wrote it."""

    name: str
    bytes: int
    xxh3: str
    pieces: tuple[FileRange, ...] | None = None

    @property
    def ranges(self) -> tuple[FileRange, ...]:
        """The ranges that units wrote; the whole file if it is of one unit."""
        return self.pieces or (FileRange(name=self.name, offset=0, bytes=self.bytes, xxh3=self.xxh3),)


class TiedPair(Part):
    """Two tied tensors of the source, of which one is written; the engine ties them again when it loads."""

    kept: str
    tied: str


# Models of pydantic take several times the memory of dataclasses, which it checks all the same, and there may be a
# hundred thousand of these.
ROW = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A tensor that was written, with its xxh3-64."""

    __pydantic_config__: ClassVar[ConfigDict] = ROW
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedTensor:
    """The sizes and errors of one tensor. Infinities are None."""

    __pydantic_config__: ClassVar[ConfigDict] = ROW
    name: str
    role: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    source_bytes: int
    output_bytes: int
    relative_error: float | None
    sqnr_db: float | None
    cosine: float
    max_error: float
    sums: ErrorSums
    stored: dict[str, StoredPart]
    backend: str = "cpu"  # on which it was encoded

    @staticmethod
    def of(tensor: TensorRecord) -> ReportedTensor:
        """Make the entry of a tensor from its unit's record."""
        return ReportedTensor(
            name=tensor.name, role=tensor.role, action=tensor.action, dtype=tensor.dtype, shape=tensor.shape,
            source_bytes=tensor.source_bytes, output_bytes=tensor.output_bytes, **tensor_errors(tensor.error),
            sums=tensor.error,
            stored={
                name: StoredPart(dtype=dtype, shape=shape, bytes=size, xxh3=digest)
                for name, (dtype, shape, size, digest) in tensor.stored.items()
            },
            backend=tensor.backend,
        )  # fmt: skip


class LintFinding(Part):
    """A problem that an engine will have with the output: see `loaders.lint.Finding`."""

    level: str
    engine: str
    what: str
    happens: str
    remedy: str
    loads_in: str = ""


class SourceTag(Part):
    """The version of a file that the output was made of: the store's tag (a time, an ETag, a hash), and its bytes.

    xxh3: the xxh3-128 of a file without weights in a folder, whose tag is only a time.
    """

    name: str
    bytes: int
    tag: str
    xxh3: str | None = None


class RunReport(Part):
    """The time, place and speed of a job's run.

    Seconds by phase are the job's own, summed over threads. `wall_s`, `throughput_gbps` and `peak_anonymous_bytes` are
    those of the pass, which `jobs_in_pass` jobs shared. So is `peak_working_set_bytes`, the memory that Kubernetes
    counts, of all in the container, with the cached files in use; None where no container counts it. `bound_by` is what
    took longest of a job with a source or an output that is not local: "fetch", "encode" or "upload".
    """

    key: str
    sweep: str | None
    started: str
    wall_s: float
    throughput_gbps: float
    read_s: float
    encode_s: float
    measure_s: float
    write_s: float
    upload_s: float = 0.0
    bound_by: str | None = None
    bytes: int
    files: int
    tensors: int
    peak_anonymous_bytes: int
    peak_working_set_bytes: int | None = None
    units: int
    units_resumed: int
    retries: int
    jobs_in_pass: int
    cost: float | None
    strategy: str
    backend: str
    cluster: str
    nodes: tuple[str, ...]
    python: str
    request: dict[str, Any]
    tags: tuple[SourceTag, ...] = ()
    page: str | None = None  # the xxh3-128 of OUR_PAGE; older outputs have none
    xxh3: str = ""  # of the whole file, where these digits are zeros; older reports have none


class Report(Part):
    """weightmill.json. What does not depend on the machine is the same wherever a job runs.

    `run` and `quality` (in `damage`, too) depend on it, and where backend=auto chose a GPU, to the same bytes, the
    tensors' `backend` and the last digits of their errors.
    `job` is the resolved request without settings that cannot change the result; `aux` maps the auxiliary files to
    their xxh3-128, a model card's without its marked blocks; `damage` is None in reports that are older than it.
    """

    format: int
    job: dict[str, Any]
    source: ReportedSource
    adapter: ReportedAdapter | None = None
    imatrix: ReportedImatrix | None = None
    totals: Totals
    files: tuple[WeightFile, ...]
    aux: dict[str, str]
    aux_bytes: dict[str, int] = Field(default_factory=dict)  # but of the card, which may be edited
    tied: tuple[TiedPair, ...]
    warnings: tuple[str, ...]
    lint: tuple[LintFinding, ...]
    tensors: tuple[ReportedTensor, ...]
    versions: dict[str, str]
    quality: dict[str, Any] | None = None
    damage: Damage | None = None
    run: RunReport

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; keys that do not apply are left out."""
        return self.model_dump(mode="json", exclude=self._left_out())

    def to_bytes(self) -> bytes:
        """Return the bytes of the file, made at once: as Python's objects they would take several times the memory."""
        blank = self.model_copy(update={"run": self.run.model_copy(update={"xxh3": BLANK})})
        raw = blank.model_dump_json(indent=2, exclude=self._left_out()).encode() + b"\n"
        return _with_hash(raw, digest(raw))

    def _left_out(self) -> dict[str, Any]:
        """Return the keys that do not apply, as pydantic wants them."""
        may_lack = ("quality", "adapter", "imatrix", "damage")
        found: dict[str, Any] = {key: True for key in may_lack if getattr(self, key) is None}
        files = {index: {"pieces"} for index, file in enumerate(self.files) if file.pieces is None}
        return {**found, "files": files} if files else found

    @staticmethod
    def from_json(raw: bytes, where: str = OUR_REPORT) -> Report:
        """Parse the content of a report file; `where` is its path, for messages.

        Raises:
            BadSpec: it is of another format version.
            BadCheckpoint: it is not a report.
        """
        try:
            found = json.loads(raw)
            version = found["format"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise BadCheckpoint(f"{where}: not a report of weightmill ({type(error).__name__}: {error})") from None
        if type(version) is not int or version != FORMAT:
            raise BadSpec(
                f"output.path: {where} is of format {shown(version)}, this weightmill reads {FORMAT};"
                " use the version that wrote it"
            )
        try:
            report = Report.model_validate_json(raw)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = shown(".".join(map(str, fault["loc"]))).strip("'")
            wrong = "an unknown key" if fault["type"] == "extra_forbidden" else expected(fault)
            said = f"{place}: {wrong}" if place else "its JSON has a text that is none in UTF-8"
            raise BadCheckpoint(f"{where}: not a report of this version ({said}); fetch it again") from None
        if report.run.xxh3 and digest(_with_hash(raw, BLANK)) != report.run.xxh3:
            raise BadCheckpoint(f"{where}: it is damaged: it is not what was written; fetch it again")
        return report


BLANK = "0" * 16


def _with_hash(raw: bytes, found: str) -> bytes:
    """Return a report's bytes with another hash: the last text of its kind, as `run` is last and its hash the last."""
    before, key, after = raw.rpartition(b'"xxh3": "')
    return before + key + found.encode() + after[len(BLANK) :]


def read_report(output: Address) -> Report:
    """Read the report of an output.

    Raises:
        BadSpec: there is none, or it is of another format version.
        BadCheckpoint: it is damaged.
    """
    files = PinnedFiles(open_store(output))
    if files.find(OUR_REPORT) is None:
        folder = output.parent
        is_within = output.is_local and folder != output and open_store(folder).find(OUR_REPORT) is not None
        hint = f"; give its folder: {folder}" if is_within else ""
        raise BadSpec(f"output.path: expected an output of weightmill at {output}, found no {OUR_REPORT} there{hint}")
    return Report.from_json(files.read_all(OUR_REPORT, JSON_REPORT), str(output / OUR_REPORT))


def warnings_of(output: Address) -> tuple[str, ...]:
    """Return what was warned of when an output was made; nothing, if its report is not there or cannot be read."""
    try:
        return read_report(output).warnings
    except WeightmillError:
        return ()


def files_named(output: Address) -> set[str]:
    """Return the names of the files that an output's report lists, and of the report; works for all format versions.

    Raises:
        BadCheckpoint: the report does not list them.
    """
    # It is not parsed as a Report, so that a report of another version still protects its files from being replaced.
    found = read_json(PinnedFiles(open_store(output)), OUR_REPORT)
    try:
        page = [OUR_PAGE] if found["run"].get("page") else []
        return {OUR_REPORT, *page, *found["aux"], *(file["name"] for file in found["files"])}
    except (KeyError, TypeError, AttributeError):
        raise BadCheckpoint(f"{output / OUR_REPORT}: it does not say which files weightmill wrote") from None


def totals_of(tensors: Sequence[ReportedTensor]) -> Totals:
    """Sum up the sizes and errors of all tensors, and of those that were quantized or cast."""
    mine = [tensor for tensor in tensors if tensor.action in ("quantize", "cast")]
    changed = Changed(**stats_of(mine).to_json()) if mine else None
    return Totals(**stats_of(tensors).to_json(), changed=changed)


def stats_of(tensors: Sequence[ReportedTensor]) -> CompressionStats:
    """Sum up the sizes and errors of tensors."""
    error = ErrorSums.total(tensor.sums for tensor in tensors)
    return CompressionStats(
        tensors=len(tensors),
        parameters=sum(t.sums.numel for t in tensors if not dtype_named(t.dtype).is_integer),
        source_bytes=sum(tensor.source_bytes for tensor in tensors),
        output_bytes=sum(tensor.output_bytes for tensor in tensors),
        error=error,
    )


def tensor_errors(error: ErrorSums) -> Mapping[str, Any]:
    """Return the metrics of a tensor that follow from its sums, as the report has them."""
    return {
        "relative_error": finite(error.relative_error),
        "sqnr_db": finite(error.sqnr_db),
        "cosine": error.cosine,
        "max_error": error.max_error,
    }
