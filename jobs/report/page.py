"""report.html, the page of an output for a browser: what it is, plan, pictures, the worst tensors, how to load it.

It shows weightmill.json and the plan. Like the model card it tells nothing of when or where the job ran, so that the
same job makes the same page.
"""

from __future__ import annotations

from collections.abc import Iterator

from jobs.output.report import Report, ReportedTensor
from jobs.planning.plan import Plan, TargetPlan
from jobs.planning.warnings import HERE
from jobs.report import html
from jobs.report.card_metadata import Origin, origin_of
from jobs.report.command import command_of, said
from jobs.report.html import code
from jobs.report.loading import loading_of
from jobs.report.metrics import worst_of
from jobs.report.pictures import pictures
from jobs.report.plan import decision_rows
from jobs.report.tables import number, size, times
from loaders.storage.address import Address
from loaders.storage.hub.store import Place
from loaders.words import counted

MOST_ROWS, MOST_TENSORS, MOST_FILES, MOST_WARNINGS = 100, 25, 200, 100
CAPTIONS = {
    "size": "Size by role of tensors",
    "error_by_layer": "Relative error by layer",
    "mix": "Bits a weight, by layer and module",
}


def make_page(report: Report, plan: Plan, target: TargetPlan, output: Address) -> bytes:
    """Return the page of a finished output, whose files will be at `output`."""
    origin, version = origin_of(report), report.versions["weightmill"]
    title = f"{report.job['model']['name'] or origin.title} in {report.job['quant']['name']}"
    made = f"Made by weightmill {version}. Every tensor was decoded again and compared with its source."
    return html.page(
        title,
        [
            html.tag("h1", title),
            html.tag("p", made, "dim"),
            html.numbers(_numbers(report)),
            html.section("How to load it", _loaded(plan, target, output)),
            html.section("Warnings and findings", _warnings(report, origin)),
            html.section("Pictures", (html.figure(CAPTIONS[name], svg) for name, svg in pictures(report).items())),
            html.section("Plan", _plan(report, target)),
            html.section("What it cost, by role of tensors", _roles(report)),
            html.section("Worst tensors", _worst(report)),
            html.section("In its engine", _quality(report)),
            html.section("What it is made from", _source(report, origin)),
            html.section("Files", _files(report)),
        ],
    )


def _numbers(report: Report) -> Iterator[tuple[str, str]]:
    total = report.totals
    before = total.source_bytes * 8 / max(1, total.parameters)
    yield size(total.output_bytes), f"of {size(total.source_bytes)}: {times(total.ratio)}"
    yield f"{total.bits_per_weight:.2f}", f"bits per weight, before {before:.2f}"
    yield f"{total.parameters:,}", "parameters"
    yield number(total.relative_error), "relative error over all weights"
    if total.sqnr_db is not None:
        yield f"{total.sqnr_db:.2f} dB", "SQNR over all weights"
    if report.quality is not None and "kl" in report.quality:
        yield number(report.quality["kl"]), "KL divergence, nats a token"


def _loaded(plan: Plan, target: TargetPlan, output: Address) -> Iterator[str]:
    loading = loading_of(plan, target, Place.of(output).repo if output.scheme == "hf" else "DIR")
    yield html.tag("p", f"Loaded by {loading.engine}" + (":" if loading.code else "."))
    if loading.code:
        yield html.block(loading.code)


def _warnings(report: Report, origin: Origin) -> Iterator[str]:
    names = {report.source.path: origin.name}
    if report.adapter is not None:
        names[report.adapter.path] = Address.of(report.adapter.path).name
    if report.imatrix is not None:
        names[report.imatrix.path] = Address.of(report.imatrix.path).name
    told = []
    for warning in report.warnings[:MOST_WARNINGS]:
        told.append(warning.replace(HERE, ""))
        for path, name in names.items():
            told[-1] = told[-1].replace(path, name)
    if more := report.warnings[MOST_WARNINGS:]:
        told.append(f"and {len(more)} more, which weightmill.json has")
    yield html.items(told)
    found = [(each.level, each.what, f"{each.engine}: {each.happens}", each.remedy) for each in report.lint]
    if found:
        yield html.table(("", "what", "what will happen", "what to do"), found[:MOST_WARNINGS])


def _plan(report: Report, target: TargetPlan) -> Iterator[str]:
    quant = report.job["quant"]
    named = {k: v for k, v in quant.items() if k not in ("kind", "name", "chosen") and v not in (None, [])}
    settings = ", ".join(f"{key} {said(f'quant.{key}', value)}" for key, value in named.items())
    how = f"layout {target.target.layout.name}, container {target.target.container.name}"
    yield html.tag("p", html.joined([code(quant["name"]), f": {settings}; {how}" if settings else f": {how}"]))
    rows = decision_rows(target)
    cells = [
        (row["action"], str(row["tensors"]), size(row["source_bytes"]), size(row["output_bytes"]), code(row["rule"]),
         row["why"])
        for row in rows[:MOST_ROWS]
    ]  # fmt: skip
    yield html.table(("action", "-tensors", "-before", "-after", "which", "why"), cells)
    if more := rows[MOST_ROWS:]:
        yield html.tag("p", f"and {len(more)} rules more")
    yield html.tag("p", "This makes it again:")
    yield html.block(command_of(report.run.request, report.source.path))


def _roles(report: Report) -> Iterator[str]:
    if report.damage is None or not report.damage.roles:
        return
    cells = [
        (role, str(each.tensors), f"{each.parameters:,}", f"{each.bits_per_weight:.3f}", number(each.relative_error),
         number(each.sqnr_db, 2), number(each.worst.relative_error if each.worst else 0.0))
        for role, each in report.damage.roles.items()
    ]  # fmt: skip
    columns = ("changed tensors", "-number", "-weights", "-bits per weight", "-relative error", "-SQNR dB",
               "-the worst's error")  # fmt: skip
    yield html.table(columns, cells)
    yield html.tag("p", "An error is sqrt(sum (x - y)^2 / sum x^2) of the weights x and the decoded ones y.", "dim")


def _worst(report: Report) -> Iterator[str]:
    found = worst_of(report.tensors, MOST_TENSORS)
    columns = ("tensor", "role", "shape", "-bits per weight", "-relative error", "-SQNR dB", "-max error")
    if found:
        yield html.table(columns, map(_tensor, found))


def _tensor(tensor: ReportedTensor) -> tuple[str, ...]:
    bits = tensor.output_bytes * 8 / max(1, tensor.sums.numel)
    shape = " × ".join(map(str, tensor.shape))
    return (
        code(tensor.name), tensor.role, shape, f"{bits:.2f}", number(tensor.relative_error), number(tensor.sqnr_db, 2),
        f"{tensor.max_error:.4g}",
    )  # fmt: skip


def _quality(report: Report) -> Iterator[str]:
    rows = [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.5f}")
        for name, value in (report.quality or {}).items()
        if isinstance(value, int | float) and not name.endswith("seconds")
    ]
    texts = [f"{name}: {value}" for name, value in (report.quality or {}).items() if isinstance(value, str)]
    if rows:
        yield html.tag("p", "; ".join(texts))
        yield html.table(("", "-"), rows)


def _source(report: Report, origin: Origin) -> Iterator[str]:
    source = report.source
    shown = code(origin.name)
    if origin.hub_id is not None:
        shown = html.link(origin.hub_id, f"https://huggingface.co/{origin.hub_id}")
        shown = shown if origin.revision is None else html.joined([shown, " at ", code(origin.revision)])
    total = sum(file.bytes for file in source.files)
    kind = [] if not isinstance(source.model_type, str) else ["model_type ", code(source.model_type), ", "]
    rows: list[str] = [
        shown,
        html.joined([*kind, f"{source.container}, {counted(len(source.files), 'file')}, {size(total)}"]),
        html.joined(["fingerprint of what its headers say: ", code(source.fingerprint)]),
    ]
    if (adapter := report.adapter) is not None:
        name = code(Address.of(adapter.path).name)
        rows.append(html.joined(["the adapter ", name, f" is merged into {counted(adapter.tensors, 'tensor')}"]))
    if (imatrix := report.imatrix) is not None:
        name, what = code(Address.of(imatrix.path).name), counted(imatrix.tensors, "tensor")
        rows.append(html.joined(["the importance matrix ", name, f" decided about errors of {what}"]))
    rows += [html.joined([code(t.tied), " is tied to ", code(t.kept), ", and written once"]) for t in report.tied]
    rows.append(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    yield html.items(rows)


def _files(report: Report) -> Iterator[str]:
    cells = [(code(file.name), f"{file.bytes:,}", code(file.xxh3)) for file in report.files[:MOST_FILES]]
    yield html.table(("weights", "-bytes", "xxh3-128"), cells)
    if more := report.files[MOST_FILES:]:
        yield html.tag("p", f"and {counted(len(more), 'file')} more, which weightmill.json has")
    yield html.tag("p", "weightmill.json has every tensor and the hash of every file.", "dim")
