"""The model card of an output, README.md: the Hub's metadata, what weightmill did and what it cost, the source's card.

What weightmill says stands in the marked blocks of jobs/output/card_block.py. Nothing of it depends on when or on which
machine the job ran, and no path of a machine or secret is in it.
"""

from __future__ import annotations

from collections.abc import Iterator

from jobs.output.card_block import BEGIN, END, around_block, with_block
from jobs.output.damage import Damage, Judged, JudgedStates
from jobs.output.report import Report
from jobs.planning.plan import Plan, TargetPlan
from jobs.planning.warnings import HERE
from jobs.report.card_metadata import front_matter, origin_of
from jobs.report.command import command_of, said
from jobs.report.loading import Loading, loading_of
from jobs.report.markdown import code, line, one_line, table
from jobs.report.plan import decision_rows
from jobs.report.source_card import SourceCard
from jobs.report.tables import number, size, times
from loaders.storage.address import Address
from loaders.storage.hub.store import Place
from loaders.words import counted

THEIRS = "# The card of its source"
MOST_ROWS, MOST_WARNINGS = 30, 50  # of the table of rules, and warnings


def make_card(report: Report, plan: Plan, target: TargetPlan, theirs: SourceCard, output: Address) -> bytes:
    """Return the card of a finished output, whose files will be at `output`."""
    loading = loading_of(plan, target, _where(output))
    parts = [*front_matter(report, target, theirs, loading), "", BEGIN]
    has_card = bool(theirs.text or theirs.note)
    parts += [_block(report, target, loading, has_card=has_card), END]
    parts += ["", f"*{line(theirs.note)}*"] if theirs.note is not None else []
    parts += ["", theirs.text] if theirs.text else []
    return ("\n".join(parts) + "\n").encode()


def updated(card: bytes, report: Report, plan: Plan, target: TargetPlan, output: Address) -> bytes:
    """Return a card of an output with what its report says now; a card that is not weightmill's comes back as it is."""
    loading = loading_of(plan, target, _where(output))
    return with_block(card, _block(report, target, loading, has_card=bool(around_block(card)[1].strip())))


def _where(output: Address) -> str:
    """Return what an output is loaded by: its id on the Hub, or a word for its folder."""
    return Place.of(output).repo if output.scheme == "hf" else "DIR"


# --- what weightmill says


def _block(report: Report, target: TargetPlan, loading: Loading, *, has_card: bool) -> str:
    sections = [
        *_made_from(report, target),
        *_how(report, target),
        *_cost(report),
        *_loaded(loading),
        *_warnings(report),
    ]
    sections += ["", THEIRS] if has_card else []
    # A name in the source could otherwise end the block.
    return "\n".join(sections).replace("<!--", "<! --")


def _made_from(report: Report, target: TargetPlan) -> Iterator[str]:
    source, origin = report.source, origin_of(report)
    yield f"# {line(report.job['model']['name'] or origin.title)} in {report.job['quant']['name']}"
    yield ""
    version = report.versions["weightmill"]
    yield f"Made by weightmill {version}. Every tensor was decoded again and compared with its source."
    yield ""
    yield "## What it is made from"
    yield ""
    yield f"- source: {origin.shown}"
    total = sum(file.bytes for file in source.files)
    kind = f"model_type {code(source.model_type)}, " if isinstance(source.model_type, str) else ""
    yield f"- {kind}{source.container}, {counted(len(source.files), 'file')}, {size(total)}"
    yield f"- fingerprint of what its headers say: {code(source.fingerprint)}"
    if report.adapter is not None:
        name = Address.of(report.adapter.path).name
        yield (
            f"- the adapter {code(name)} is merged into {counted(report.adapter.tensors, 'tensor')}:"
            f" {code(report.adapter.name)}, xxh3-128 {code(report.adapter.xxh3)}"
        )
    if (imatrix := report.imatrix) is not None:
        over = f", made over {counted(imatrix.chunks, 'chunk')} of text" if imatrix.chunks else ""
        yield (
            f"- the importance matrix {code(Address.of(imatrix.path).name)}"
            f" ({counted(imatrix.entries, 'tensor')}{over})"
            f" decided about errors of {counted(imatrix.tensors, 'tensor')}: xxh3-128 {code(imatrix.xxh3)}"
        )
    if report.job["transform"].get("num_blocks"):
        yield f"- {report.job['transform']['num_blocks']} decoder blocks were added, which change nothing until trained"
    for pair in report.tied:
        yield f"- {code(pair.tied)} is tied to {code(pair.kept)}, and written once"


def _how(report: Report, target: TargetPlan) -> Iterator[str]:
    quant = report.job["quant"]
    named = {k: v for k, v in quant.items() if k not in ("kind", "name", "chosen") and v not in (None, [])}
    settings = ", ".join(f"{key} {said(f'quant.{key}', value)}" for key, value in named.items())
    yield from ("", "## How", "")
    yield f"- {code(quant['name'])}" + (f": {line(settings)}" if settings else "")
    yield f"- layout {target.target.layout.name}, container {target.target.container.name}"
    yield "- " + ", ".join(f"{name} {version}" for name, version in report.versions.items())
    rows = decision_rows(target)
    cells = [
        (row["action"], str(row["tensors"]), size(row["source_bytes"]), size(row["output_bytes"]), code(row["rule"]),
         line(row["why"]))
        for row in rows[:MOST_ROWS]
    ]  # fmt: skip
    yield ""
    yield from table(("action", "-tensors", "-before", "-after", "which", "why"), cells)
    yield from (
        ["", f"and {len(rows) - MOST_ROWS} rules more, which weightmill.json's job has"] if rows[MOST_ROWS:] else []
    )
    yield from (
        "",
        "This makes it again:",
        "",
        "```sh",
        one_line(command_of(report.run.request, report.source.path)),
        "```",
    )


def _cost(report: Report) -> Iterator[str]:
    total, damage = report.totals, report.damage
    before = total.source_bytes * 8 / max(1, total.parameters)
    yield from ("", "## What it cost", "")
    cells = [
        ("weights", size(total.source_bytes), size(total.output_bytes), times(total.ratio)),
        ("bits per weight", f"{before:.3f}", f"{total.bits_per_weight:.3f}", f"{total.parameters:,} parameters"),
    ]
    yield from table(("", "-before", "-after", ""), cells)
    if damage is not None:
        yield from _damage(damage)


def _damage(damage: Damage) -> Iterator[str]:
    yield ""
    yield (
        f"Relative error over all weights: {number(damage.relative_error)}, SQNR {number(damage.sqnr_db, 2)} dB. It"
        " is sqrt(sum (x - y)^2 / sum x^2) of the source's weights x and the decoded ones y."
    )
    if damage.roles:
        yield ""
        cells = [
            (role, str(each.tensors), f"{each.bits_per_weight:.3f}", number(each.relative_error),
             number(each.sqnr_db, 2), number(each.worst.relative_error if each.worst else 0.0))
            for role, each in damage.roles.items()
        ]  # fmt: skip
        named = ("changed tensors", "-number", "-bits per weight", "-relative error", "-SQNR dB", "-the worst's error")
        yield from table(named, cells)
    if damage.worst:
        yield ""
        rows = [
            (code(each.name), each.role, number(each.relative_error), number(each.sqnr_db, 2),
             f"{each.max_error:.4g}")
            for each in damage.worst
        ]  # fmt: skip
        yield from table(("worst tensors", "role", "-relative error", "-SQNR dB", "-max error"), rows)
    if damage.quality is not None:
        yield from _quality(damage.quality)


def _quality(found: Judged | JudgedStates) -> Iterator[str]:
    yield ""
    yield f"Over {found.tokens:,} tokens of {line(found.text)}, in {line(found.engine)}:"
    yield ""
    if isinstance(found, JudgedStates):
        yield f"- cosine of last hidden states: {found.cosine:.5f}{_interval(found.cosine_low, found.cosine_high)}"
        yield f"- cosine of the means of texts' hidden states: {found.pooled_cosine:.5f}"
        yield f"- relative error of last hidden states: {found.hidden_error:.5f}"
        return
    yield f"- KL(original || output): {found.kl:.5f} nats a token{_interval(found.kl_low, found.kl_high)}"
    yield (
        f"- perplexity: {found.perplexity:.4f}, the original's {found.perplexity_original:.4f}:"
        f" {found.perplexity_ratio:.5f} times"
    )
    yield f"- the same token most likely: {found.top1:.2%}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (95 %: {low:.5f} to {high:.5f})"


def _loaded(loading: Loading) -> Iterator[str]:
    yield from ("", "## How to load it", "")
    yield f"Loaded by {loading.engine}" + (":" if loading.code else ".")
    if loading.code:
        yield from ("", f"```{loading.language}", loading.code, "```")


def _warnings(report: Report) -> Iterator[str]:
    if not report.warnings:
        return
    yield from ("", "## Warnings", "")
    names = {report.source.path: origin_of(report).name}
    if report.adapter is not None:
        names[report.adapter.path] = Address.of(report.adapter.path).name
    if report.imatrix is not None:
        names[report.imatrix.path] = Address.of(report.imatrix.path).name
    for warning in report.warnings[:MOST_WARNINGS]:
        said = warning.replace(HERE, "")
        for path, name in names.items():
            said = said.replace(path, name)
        yield f"- {line(said)}"
    if more := report.warnings[MOST_WARNINGS:]:
        yield f"- and {len(more)} more, which weightmill.json has"
