"""The comparison of jobs: a table, the Pareto front of size against error, and the tensors that differ most. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from jobs.output.report import Report
from jobs.report.metrics import error_by_layer, metrics
from jobs.report.tables import in_a_line, size, table
from loaders.stats import finite

BITS, ERROR, KL = "size/bits_per_weight", "error/relative", "quality/kl"
KEPT, MUCH_KEPT = "size/kept_bytes", 0.25  # the share from which it is said
COSINE, HIDDEN_ERROR = "quality/cosine", "quality/hidden_error"
WORDS = {
    BITS: "bits per weight",
    ERROR: "relative error of the weights",
    "error/worst": "relative error of the worst tensor",
    "error/sqnr_db": "SQNR of the weights, dB",
    KL: "KL divergence of the logits, nats per token",
    "quality/perplexity": "perplexity",
    "quality/perplexity_ratio": "perplexity, times the original's",
    "quality/top1": "share of tokens with the same most likely next one",
    COSINE: "cosine of the hidden states",
    HIDDEN_ERROR: "relative error of the hidden states",
}
# Metrics of which more is better
GAINS = (COSINE, "quality/pooled_cosine", "quality/cosine_p1", "quality/cosine_min", "quality/top1", "error/sqnr_db",
         "error/sqnr_mean_db", "error/sqnr_worst_db", "error/cosine", "size/ratio")  # fmt: skip
SHOWN_TENSORS = 8  # tensors that differ most, as shown in texts; the document has more


@dataclass(frozen=True, kw_only=True)
class ComparedJob:
    """A job to compare: its status, and its metrics as far as it has any."""

    name: str
    status: str  # done, failed, killed, running, crashed
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str | None = None
    output: str | None = None
    why: str = ""
    source: str = ""  # the model that it is of, as `model_of` names it
    fingerprint: str = ""  # of that model; empty if it is not known
    layers: Mapping[int, float] = field(default_factory=dict)  # relative errors by layer
    tensors: Mapping[str, float] = field(default_factory=dict)  # relative errors by tensor

    @property
    def status_text(self) -> str:
        """The status, and its reason if there is one."""
        return f"{self.status}: {self.why}" if self.why else self.status

    @property
    def is_comparable(self) -> bool:
        return self.status == "done" and BITS in self.metrics


@dataclass(frozen=True)
class Column:
    title: str
    metric: str
    pattern: str
    scale: float = 1.0
    second: str = ""  # another metric in the same cell


# "pass" marks what the jobs of one pass took together; encoding is a job's own, summed over threads.
COLUMNS = (
    Column("bits per weight", BITS, "{:.3f}"),
    Column("times smaller", "size/ratio", "{:.2f}"),
    Column("MB", "size/output_bytes", "{:,.2f}", 1e-6),
    Column("relative error", ERROR, "{:.5f}"),
    Column("worst", "error/worst", "{:.5f}"),
    Column("SQNR dB", "error/sqnr_db", "{:.2f}"),
    Column("KL", "quality/kl", "{:.5f}"),
    Column("KL's 95 %", "quality/kl_low", "{:.5f} to {:.5f}", second="quality/kl_high"),
    Column("perplexity", "quality/perplexity", "{:.3f}"),
    Column("x original's", "quality/perplexity_ratio", "{:.4f}"),
    Column("top-1 %", "quality/top1", "{:.2f}", 100.0),
    Column("cosine", COSINE, "{:.5f}"),
    Column("cosine's 95 %", "quality/cosine_low", "{:.5f} to {:.5f}", second="quality/cosine_high"),
    Column("hidden error", HIDDEN_ERROR, "{:.5f}"),
    Column("pass s", "time/wall_s", "{:.2f}"),
    Column("encoding s", "time/encode_s", "{:.2f}"),
    Column("pass GB/s", "load/gigabytes_per_second", "{:.3f}"),
    Column("pass peak MB", "load/peak_anonymous_bytes", "{:,.0f}", 1e-6),
    Column("kubectl top's MB", "load/peak_working_set_bytes", "{:,.0f}", 1e-6),
    Column("cost", "cost/estimate", "{:.4g}"),
)


def compared_job(name: str, report: Report, run_id: str | None = None, output: str = "") -> ComparedJob:
    """Make a finished job's entry from its report."""
    layers = {layer: e.relative_error for layer, e in error_by_layer(report).items()}
    tensors = {t.name: t.relative_error for t in report.tensors if t.relative_error is not None}
    return ComparedJob(
        name=name,
        status="done",
        metrics=metrics(report),
        run_id=run_id,
        output=output,
        why="",
        source=model_of(report.run.request),
        fingerprint=report.source.fingerprint,
        layers=layers,
        tensors=tensors,
    )


def model_of(request: Mapping[str, Any]) -> str:
    """Return a name of the model that a resolved request quantizes: its source, and what changes it before."""
    model, transform = request.get("model") or {}, request.get("transform") or {}
    named = model.get("path") or model.get("hub_id") or model.get("name") or "?"
    revision = "" if model.get("path") or not model.get("revision") else f"@{model['revision']}"
    adapter = f" with {transform['path']} merged" if transform.get("path") else ""
    blocks = f" with {transform['num_blocks']} blocks more" if transform.get("num_blocks") else ""
    return f"{named}{revision}{adapter}{blocks}"


def by_source(jobs: Sequence[ComparedJob]) -> dict[str, list[ComparedJob]]:
    """Return the jobs of each model by its name; two models of one name have their fingerprints in it."""
    known: dict[str, list[str]] = {}
    for job in jobs:
        prints = known.setdefault(job.source, [])
        prints += [job.fingerprint] if job.fingerprint and job.fingerprint not in prints else []
    found: dict[str, list[ComparedJob]] = {}
    for job in jobs:
        prints = known[job.source]
        mine = job.fingerprint or (prints[0] if prints else "")
        found.setdefault(f"{job.source} ({mine[:8]})" if len(prints) > 1 else job.source, []).append(job)
    return found


def error_of(jobs: Sequence[ComparedJob]) -> str:
    """Return the metric that says best what jobs lose: of what all were judged by in engines, or else of weights."""
    done = [job for job in jobs if job.is_comparable]
    return next((name for name in (KL, HIDDEN_ERROR) if done and all(name in job.metrics for job in done)), ERROR)


def words_of(metric: str) -> str:
    """Return what a metric is called in pictures and texts."""
    return WORDS.get(metric, metric)


def pareto(jobs: Sequence[ComparedJob], error: str = ERROR) -> list[str]:
    """Return the names of the jobs that no other job beats in both bits per weight and error, smallest first.

    Sizes count as the table shows them: some bytes of headers and indexes make no job smaller than another.
    """
    sign = -1 if error in GAINS else 1
    comparable = sorted(
        (round(job.metrics[BITS], 3), sign * job.metrics[error], job.name)
        for job in jobs
        if job.is_comparable and error in job.metrics
    )
    front: list[tuple[float, float, str]] = []
    # In the order of sizes, a job is on the front if its error is below that of all smaller ones.
    for each in comparable:
        if not front or each[1] < front[-1][1]:
            front.append(each)
    return [name for _, _, name in front]


def differing(jobs: Sequence[ComparedJob]) -> list[dict[str, Any]]:
    """Return the tensors sorted by the ratio of their largest to their smallest relative error (0 not counted)."""
    rows = []
    for name in dict.fromkeys(name for job in jobs for name in job.tensors):
        errors = {job.name: job.tensors[name] for job in jobs if name in job.tensors}
        changed = {who: error for who, error in errors.items() if error > 0}
        if len(changed) > 1:
            best, worst = min(changed, key=lambda w: changed[w]), max(changed, key=lambda w: changed[w])
            ratio = changed[worst] / changed[best]
            rows.append({"tensor": name, "ratio": ratio, "least": best, "most": worst, "errors": errors})
    return sorted(rows, key=lambda row: (-row["ratio"], row["tensor"]))


class Comparison:
    """A comparison of jobs, as text for a terminal, as a Markdown page, and as JSON."""

    def __init__(self, jobs: Sequence[ComparedJob], error: str = ERROR) -> None:
        self.jobs = jobs
        self.error = error
        self.front = pareto(jobs, error)
        self.differing = differing(jobs)
        known = [column for column in COLUMNS if any(column.metric in job.metrics for job in jobs)]
        # What the jobs are compared by comes first, since the last columns are left out where a terminal is narrow.
        self._columns = sorted(known, key=lambda column: (column.metric != BITS, not column.metric.startswith(error)))

    def lines(self) -> list[RenderableType]:
        """Return the table, the Pareto front, and the tensors that differ most, for a terminal."""
        differs: list[RenderableType] = [self._differing_table(), ""] if self.differing else []
        return [self._table(), *self._kept_lines(), "", self._front_text(), "", *differs]

    @property
    def titles(self) -> list[str]:
        """The titles of the columns of numbers."""
        return [column.title for column in self._columns]

    def cells(self, job: ComparedJob) -> list[str]:
        """Return a job's numbers as texts, in the order of `titles`; empty where it has none."""
        return self._cells(job)

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {"error": self.error, "jobs": [to_json(job) for job in self.jobs], "pareto": self.front}

    def _cells(self, job: ComparedJob) -> list[str]:
        found = [(c, [job.metrics.get(name) for name in (c.metric, c.second) if name]) for c in self._columns]
        return [
            c.pattern.format(*(v * c.scale for v in values if v is not None))
            if all(v is not None and math.isfinite(v) for v in values)
            else ""
            for c, values in found
        ]

    def _table(self) -> RenderableType:
        """Return a table with one row per job; a star marks the Pareto front. Why jobs failed stands below it."""
        titles = [column.title for column in self._columns]
        shown = table("", "job", *titles, "status", keys=2, right=titles, names=("job",), once=True)
        for job in self.jobs:
            style = "" if job.status == "done" else "yellow" if job.status == "running" else "red"
            star = "*" if job.name in self.front else ""
            shown.add_row(star, job.name, *self._cells(job), Text(job.status, style=style))
        whys = [Text(in_a_line(f"{job.name} {job.status_text}"), style="red") for job in self.jobs if job.why]
        return Group(shown, *whys)

    def _kept_lines(self) -> list[str]:
        """Say how much of the outputs is not quantized, where that is what their sizes mostly are."""
        sizes = {
            job.name: (job.metrics[KEPT], job.metrics["size/output_bytes"])
            for job in self.jobs
            if job.is_comparable and KEPT in job.metrics
        }
        much = {name: both for name, both in sizes.items() if both[0] > MUCH_KEPT * both[1]}
        if not much:
            return []
        kept = {size(both[0]) for both in much.values()}
        if len(kept) == 1 and len(much) == len(sizes):
            what = f"{kept.pop()} of each output"
        else:
            what = "; ".join(f"{size(part)} of {name}" for name, (part, _) in much.items())
        return [f"not quantized: {what} (embeddings and what else its engine leaves alone; weightmill plan lists it)"]

    def _front_text(self) -> str:
        by_name = {job.name: job.metrics for job in self.jobs if job.is_comparable}
        rows = [f"  {by_name[n][BITS]:7.3f} bits  {by_name[n][self.error]:.5f}  {n}" for n in self.front]
        return "\n".join([f"Pareto front (*) of bits per weight against {self._error}, smallest first:", *rows])

    @property
    def _error(self) -> str:
        return words_of(self.error) + ("" if self.error not in WORDS else f" ({self.error})")

    def _differing_table(self) -> RenderableType:
        """Return the tensors whose errors differ most, with the jobs of the least and of the largest error."""
        tensor, numbers = "tensors that differ most", ("times", "least error", "most error")
        columns = (tensor, "times", "least error", "job", "most error", "job")
        shown = table(*columns, right=numbers, names=(tensor, "job"))
        for row in self.differing[:SHOWN_TENSORS]:
            errors, least, most = row["errors"], row["least"], row["most"]
            cells = (f"{row['ratio']:.2f}", f"{errors[least]:.5f}", least, f"{errors[most]:.5f}", most)
            shown.add_row(row["tensor"], *cells)
        return shown

    def markdown(self) -> list[str]:
        """Return the lines of the comparison in Markdown."""
        lines = ["|  | job | status | " + " | ".join(c.title for c in self._columns) + " |"]
        lines += ["|--|-----|--------|" + "|".join("---:" for _ in self._columns) + "|"]
        for job in self.jobs:
            star = "*" if job.name in self.front else ""
            said = [_cell(text) for text in (star, job.name, job.status_text, *self._cells(job))]
            lines.append("| " + " | ".join(said) + " |")
        lines += ["", f"\\* on the Pareto front of bits per weight against {self._error}.", ""]
        if rows := self.differing[:SHOWN_TENSORS]:
            lines += ["| tensors that differ most | times | least error | most error |", "|--|--:|--|--|"]
            for row in rows:
                ends = [f"{row['errors'][row[end]]:.5f} {_cell(row[end])}" for end in ("least", "most")]
                lines.append(f"| {_cell(row['tensor'])} | {row['ratio']:.2f} | {ends[0]} | {ends[1]} |")
            lines.append("")
        return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def to_json(candidate: ComparedJob) -> dict[str, Any]:
    """Describe a job as JSON, without its tensors."""
    return {
        "name": candidate.name,
        "status": candidate.status,
        "why": candidate.why,
        "run_id": candidate.run_id,
        "output": candidate.output,
        "source": candidate.source,
        "metrics": {name: finite(value) for name, value in sorted(candidate.metrics.items())},
        "error_by_layer": {str(layer): finite(value) for layer, value in candidate.layers.items()},
    }
