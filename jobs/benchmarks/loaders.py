"""The output of `weightmill bench loaders`: a table, a plot and MLflow runs."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from jobs.benchmarks.busy_machine import warning
from jobs.benchmarks.loader_timings import measure, yaml_line
from jobs.benchmarks.random_llama import given_or_random
from jobs.cli.verb import Said
from jobs.report.plots import drawn
from jobs.report.tables import table
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.run import open_run

COLUMNS = {
    "warm": "warm_gbps_median", "warm best": "warm_gbps_best",
    "cold": "cold_gbps_median", "cold best": "cold_gbps_best", "warm CPU s": "warm_cpu_s", "cold CPU s": "cold_cpu_s",
    "first byte s": "first_byte_s",
}  # fmt: skip


def time_loaders(
    path: str | None, gb: float, folder: str | None, names: Sequence[str], repeats: int, cold: bool, root: Path,
    tracking: TrackingSpec,
) -> Said:  # fmt: skip
    """Time every strategy on a checkpoint, draw a plot in `root`, and track a run for each strategy.

    Raises:
        BadSpec: the folder holds no weights, or a strategy is unknown.
    """
    with given_or_random(path, gb, folder) as (_, source):
        document = measure(str(source), names, repeats, cold=cold)
    plot = drawn(root / f"loaders-{source.name}.png", lambda path: draw(document, path))
    tracked = track(document, tracking, root, plot)
    shown = None if plot is None else str(plot)
    return Said({**document, "plot": shown, "tracked": tracked}, timings_text(document, plot))


def timings_text(document: Mapping[str, Any], plot: Path | None) -> RenderableType:
    """Render a table of median and best GB/s and of ratios, and the fastest strategies as YAML."""
    titles = (*COLUMNS, "peak MB", "of the yardstick")
    shown = table("GB/s:", *titles, "", right=titles, prose=("",))
    for row in (row for row in document["rows"] if not row["missing"]):
        numbers = [f"{row[key]:.2f}" if row[key] is not None else "" for key in COLUMNS.values()]
        ratios = [_ratio(document, kind, row["case"]) for kind in document["ratios"]]
        peak = f"{row['peak_bytes'] / 1e6:.0f}" if row["is_strategy"] else ""
        shown.add_row(row["case"], *numbers, peak, ", ".join(filter(None, ratios)), _said(row["said"]))
    lines: list[RenderableType] = [
        f"{document['path']}: {document['bytes'] / 1e9:.2f} GB of {document['container']} on {document['filesystem']},"
        f" {document['threads']} threads, {document['repeats']} laps",
        shown,
        *(f"{row['case']}: {row['missing']}" for row in document["rows"] if row["missing"]),
        "yardsticks: warm, summing the mapped files in place; cold, the best plain read. Every byte is summed."
        " Ratios are of medians, in brackets of single laps.",
    ]
    if (busy := warning(document["busy"])) is not None:
        lines.append(Text(busy, style="yellow"))
    if not document["is_cold"]:
        stayed = document["stayed_in_cache"]
        why = "not asked for, or not possible here" if stayed is None else f"{stayed:.0%} of a file stayed in memory"
        lines.append(f"cold: not measured, since dropping the files from the page cache was {why}")
    for kind, winners in document["winners"].items():
        for use, name in winners.items():
            lines.append(f"fastest {kind}, for {use}:  {yaml_line(name)}")
    return Group(*lines, *([f"plot: {plot}"] if plot is not None else []))


def _ratio(document: Mapping[str, Any], kind: str, case: str) -> str:
    if case not in document["ratios"][kind]:
        return ""
    laps = document["spread"][kind].get(case, ())
    return f"{kind} {document['ratios'][kind][case]:.0%}" + (f" ({laps[0]:.0%} to {laps[-1]:.0%})" if laps else "")


def _said(said: Mapping[str, str]) -> str:
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{kind}: {text}" for kind, text in said.items())


def draw(document: Mapping[str, Any], path: Path) -> Path:
    """Draw bars of the median GB/s, warm and cold, as a PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if not row["missing"]][::-1]
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for kind, shift, color in (("warm", 0.2, "tab:orange"), ("cold", -0.2, "tab:blue")):
        rates = [row[f"{kind}_gbps_median"] or 0 for row in rows]
        axes.barh([place + shift for place in range(len(rows))], rates, 0.4, color=color, label=kind)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.set(xlabel="GB/s, every byte summed", title=f"loading {Path(document['path']).name}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def track(document: Mapping[str, Any], spec: TrackingSpec, root: Path, plot: Path | None) -> str | None:
    """Track a run for each strategy, and one with the plot and the whole table; returns the address of the latter."""
    sweep = uuid.uuid4().hex[:12]
    about = {key: document[key] for key in ("path", "container", "bytes", "filesystem", "threads", "repeats")}
    name, tags = Path(document["path"]).name, {"weightmill.kind": "bench", "weightmill.sweep": sweep}
    for row in document["rows"]:
        if row["is_strategy"] and not row["missing"]:
            numbers = {key: float(value) for key, value in row.items() if type(value) in (int, float)}
            run = open_run(
                spec, root, f"load {name} {row['case']}", {**about, "case": row["case"]}, tags, uuid.uuid4().hex
            )
            run.metrics(numbers)
            run.close("FINISHED")
    run = open_run(
        spec, root, f"load {name}", {key: str(value) for key, value in about.items()}, tags, uuid.uuid4().hex
    )
    run.document("loaders.json", document)
    if plot is not None:
        run.figures(lambda folder: [draw(document, folder / plot.name)])
    run.close("FINISHED")
    return run.address
