"""What a job shows at its end: sizes, errors, the worst tensors, times, quality; and what lint found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from jobs.output.report import LintFinding, Report, RunReport
from jobs.report.metrics import worst_of
from jobs.report.tables import number, size, table, times
from loaders.lint import Finding
from loaders.words import counted

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
    shown.add_row(
        "bits per weight", f"{before:.2f}", f"{total.bits_per_weight:.2f}", f"{total.parameters:,} parameters"
    )
    parts: list[RenderableType] = [shown]
    if changed:
        actions = Counter(tensor.action for tensor in report.tensors)
        cast = f" and {actions['cast']} cast to another dtype" if actions["cast"] else ""
        parts.append(
            Text(
                f"{counted(actions['quantize'], 'tensor')} quantized{cast}: relative error of these"
                f" {changed.relative_error:.5f}"
                + (f" (SQNR {changed.sqnr_db:.2f} dB)" if changed.sqnr_db is not None else "")
                + f", cosine {changed.cosine:.6f}; {total.tensors - changed.tensors} copied unchanged"
            )
        )
        parts.append(Text(f"relative error over all weights: {number(total.relative_error)}"))
        numbers = ("relative error", "SQNR dB", "max error")
        worst = table("worst tensors", *numbers, right=numbers, names=("worst tensors",))
        rows = worst_of(report.tensors)
        for row in rows:
            worst.add_row(row.name, number(row.relative_error), number(row.sqnr_db, 2), f"{row.max_error:.4g}")
        parts += [worst] if rows else []
    parts += [Text(line) for line in _effort(run)]
    if run.bound_by is not None:
        parts.append(Text(BOUND[run.bound_by]))
    if report.quality is not None:
        parts.append(quality_text(report.quality))
    return Group(*parts)


def _effort(run: RunReport) -> Iterator[str]:
    """Yield what a job took: time, the time of its threads, units, memory."""
    before = f", {run.units_resumed} of them done before" if run.units_resumed else ""
    yield f"{run.wall_s:.2f} s, {run.throughput_gbps:.3g} GB/s, {counted(run.units, 'unit')}{before}"
    phases = ("read", "encode", "measure", "write", *(["upload"] if run.upload_s else []))
    spent = ", ".join(f"{phase} {getattr(run, f'{phase}_s'):.2f}" for phase in phases)
    yield f"seconds of all threads: {spent}"
    seen = run.peak_working_set_bytes
    beside = "" if seen is None else f"; kubectl top would show {size(seen)}, with cached files"
    yield f"peak memory: {size(run.peak_anonymous_bytes)}{beside}"


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


def findings_text(found: Sequence[Finding | LintFinding], warnings: Sequence[str] = ()) -> RenderableType:
    """Render findings: what it is, what will happen in which engine, what to do; and warnings below them.

    A warning of the plan that is a finding, too, is shown once.
    """
    same = {f"{each.what}: {each.engine} {each.happens}; {each.remedy}" for each in found}
    others = [Text(f"warning: {warning}", style="yellow") for warning in warnings if warning not in same]
    if not found and not others:
        return Text("no findings: nothing was found that its engine would stumble over", style="green")
    is_loaded = [] if any(each.level == "fault" for each in found) else [Text("no faults were found", style="green")]
    return Group(*(_finding(finding) for finding in found), *others, *is_loaded)


def _finding(finding: Finding | LintFinding) -> RenderableType:
    """Render a finding as a few lines, which fit any terminal better than columns of sentences."""
    level, style = ("fault", "red") if finding.level == "fault" else ("warning", "yellow")
    lines = (f"{finding.engine}: {finding.happens}", f"what to do: {finding.remedy}")
    head = Text.assemble((f"{level}: ", style), finding.what)
    return Group(head, *(Padding(Text(line), (0, 0, 0, 4)) for line in lines))
