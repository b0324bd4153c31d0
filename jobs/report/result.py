"""What a job shows at its end: sizes, errors, the worst tensors, times, quality; and what lint found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from jobs.output.report import LintFinding, Report
from jobs.report.metrics import worst_of
from jobs.report.tables import number, size, table, times
from loaders.lint import Finding

BOUND = {
    "fetch": "bound by fetching: threads waited longest for the source's bytes",
    "encode": "bound by the work here (encode, measure, write): the source and the output's store were faster",
    "upload": "bound by uploading: finished files waited longest for the output's store",
}


def result_text(report: Report) -> RenderableType:
    """Render the result of a job: sizes, errors, times, and the quality if it was evaluated."""
    run, total, changed = report.run, report.totals, report.totals.changed
    shown = table("", "before", "after", "", right=("before", "after"))
    shown.add_row("weights", size(total.source_bytes), size(total.output_bytes), times(total.ratio))
    before = total.source_bytes * 8 / max(1, total.parameters)
    shown.add_row("bits a weight", f"{before:.2f}", f"{total.bits_per_weight:.2f}", f"{total.parameters:,} parameters")
    parts: list[RenderableType] = [shown]
    if changed:
        parts.append(
            Text(
                f"{changed.tensors} tensors changed: relative error {changed.relative_error:.5f}"
                + (f" (SQNR {changed.sqnr_db:.2f} dB)" if changed.sqnr_db is not None else "")
                + f", cosine {changed.cosine:.6f}; {total.tensors - changed.tensors} copied bit by bit"
            )
        )
        worst = table(
            "worst tensors", "relative error", "SQNR dB", "max error", right=("relative error", "SQNR dB", "max error")
        )
        rows = worst_of(report.tensors)
        for row in rows:
            worst.add_row(row.name, number(row.relative_error), number(row.sqnr_db, 2), f"{row.max_error:.4g}")
        parts += [worst] if rows else []
    speed = table(
        "seconds",
        "GB/s",
        "of threads: read",
        "encode",
        "measure",
        "write",
        *(["upload"] if run.upload_s else []),
        "peak memory, with libraries",
        "units",
        right=("seconds", "GB/s"),
    )
    speed.add_row(
        f"{run.wall_s:.2f}", f"{run.throughput_gbps:.2f}",
        *(f"{getattr(run, f'{phase}_s'):.2f}" for phase in ("read", "encode", "measure", "write")),
        *([f"{run.upload_s:.2f}"] if run.upload_s else []),
        size(run.peak_anonymous_bytes), f"{run.units} ({run.units_resumed} done before)",
    )  # fmt: skip
    parts.append(speed)
    if run.bound_by is not None:
        parts.append(Text(BOUND[run.bound_by]))
    if report.quality is not None:
        parts.append(quality_text(report.quality))
    return Group(*parts)


def quality_text(quality: Mapping[str, Any]) -> RenderableType:
    """Render the quality of an output, compared with its original."""
    has_interval = any(value is not None for name, value in quality.items() if name.endswith("_low"))
    few = "" if has_interval else f" (only {quality['windows']} windows: no intervals)"
    titles = (f"over {quality['tokens']:,} tokens of {quality['text']}{few}", " ", "95 %" if has_interval else "", "")
    shown = table(*titles, right=(" ",))
    for row in _logits(quality) if "kl" in quality else _hidden_states(quality):
        shown.add_row(*row)
    return shown


def _logits(quality: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    spread = f"99 % of tokens below {quality['kl_p99']:.4f}, none above {quality['kl_max']:.4f}"
    yield "KL(original || output), nats a token", f"{quality['kl']:.5f}", _interval(quality, "kl"), spread
    both = f"{quality['perplexity']:.4f}, the original's {quality['perplexity_original']:.4f}"
    ratio = f"{quality['perplexity_ratio']:.5f}"
    yield "perplexity, times the original's", ratio, _interval(quality, "perplexity_ratio"), both
    yield "same token most likely", f"{quality['top1']:.2%}", "", _where(quality)


def _hidden_states(quality: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    spread = f"99 % of tokens above {quality['cosine_p1']:.4f}, none below {quality['cosine_min']:.4f}"
    yield "cosine of hidden states", f"{quality['cosine']:.5f}", _interval(quality, "cosine"), spread
    yield "cosine of a window's mean", f"{quality['pooled_cosine']:.5f}", "", ""
    yield "relative error of hidden states", f"{quality['hidden_error']:.5f}", "", _where(quality)


def _where(quality: Mapping[str, Any]) -> str:
    return f"in {quality['engine']}; {quality['seconds']:.1f} s, the original {quality['reference_seconds']:.1f} s"


def _interval(quality: Mapping[str, Any], name: str) -> str:
    low, high = quality[f"{name}_low"], quality[f"{name}_high"]
    return "" if low is None or high is None else f"{low:.5f} to {high:.5f}"


def findings_text(found: Sequence[Finding | LintFinding]) -> RenderableType:
    """Render findings as a table: what it is, what will happen in which engine, what to do."""
    if not found:
        return Text("no findings: nothing was found that its engine would stumble over", style="green")
    shown = table("", "what", "what will happen", "what to do")
    for finding in found:
        style = "red" if finding.level == "fault" else "yellow"
        shown.add_row(
            Text(finding.level, style=style), finding.what, f"{finding.engine}: {finding.happens}", finding.remedy
        )
    return shown
