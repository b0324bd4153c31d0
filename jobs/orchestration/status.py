"""What `status` says of an output, and `list` of all in a folder: from reports and journals alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from jobs.cli.program import program
from jobs.cli.verb import FAILED, Said
from jobs.output.life import Life
from jobs.output.report import Report
from jobs.output.state import JournalState, Word, journals_in, report_of
from jobs.report.command import rerun_of
from jobs.report.status import list_text, status_text
from loaders.errors import BadCheckpoint, BadSpec, WeightmillError
from loaders.storage import kind_of
from loaders.storage.address import Address
from loaders.words import counted

AT_WORK = ("running", "silent")
MOST_OUTPUTS = 1000  # folders that a list looks into
AT_ONCE = 8  # of these, since in a store nearly all of the time is latency


def status(output: Address) -> Said:
    """Say how an output stands. The exit status is 1 if work is left and nobody does it.

    Raises:
        BadSpec: there is neither an output nor a journal of one.
        BadCheckpoint: its report is damaged, and there is no journal.
        StorageError: the place cannot be read.
    """
    journals = journals_in(output.parent, output.name)
    report, fault = _report(output, has_journal=bool(journals))
    if report is None and not journals:
        raise BadSpec(
            f"output.path: expected an output of weightmill at {output}, or the journal of one beside it, found"
            " neither, or nothing that this user may read; a job that was stopped before its first unit was finished"
            f" leaves none; {program()} list says what is in a folder"
        )
    journal = journals[0] if journals else None
    document = status_document(output, report, journal)
    document["journals"] = [str(each.address) for each in journals]
    if fault:
        document["fault"] = "; ".join(filter(None, [fault, document["fault"]]))
    is_left = document["state"] not in ("complete", "running")
    return Said(document, status_text(document), FAILED if is_left else 0)


def _report(output: Address, *, has_journal: bool) -> tuple[Report | None, str]:
    """Return the report of an output, and what is wrong with it; while a job writes the output anew it may be so."""
    try:
        return report_of(output), ""
    except (BadSpec, BadCheckpoint) as error:
        if not has_journal:
            raise
        return None, str(error).removeprefix("output.path: ")


def status_document(output: Address, report: Report | None, journal: JournalState | None) -> dict[str, Any]:
    """Describe an output and its newest journal as JSON; what is not known is None."""
    word = _word(report, journal)
    life = None if journal is None else journal.life
    document: dict[str, Any] = {
        "status": "done",
        "output": str(output),
        "state": word,
        "why": (life.why or None) if life is not None and word == "failed" else None,
        "fault": "" if journal is None else journal.fault,
        "report": None if report is None else report_document(report),
        "units": None,
        "bytes": None,
        "seconds_left": None,
        "retries": None,
        "machines": [],
        "flying": [],
        "failures": {},
        "driver": None,
        "command": None,
        "journal": None,
    }
    if journal is None or word == "complete":
        return document
    is_at_work = word in AT_WORK
    seen = None if life is None else life.seen
    flying = len(seen.flying) if seen is not None and is_at_work else 0
    failed = len(seen.failed) if seen is not None else 0
    # Records tell what is done, which a sign of some seconds ago may not know yet.
    left = None if journal.units is None else max(0, journal.units - journal.units_done - flying - failed)
    document |= {
        "units": {
            "total": journal.units,
            "done": journal.units_done,
            "flying": flying,
            "failed": failed,
            "left": left,
        },
        "driver": None if life is None else _driver(life, journal.sign_age_s),
        "command": _command(journal, output),
        "journal": {"path": str(journal.address), "bytes": journal.size, "age_s": journal.age_s},
    }
    if seen is not None:
        document |= {
            "bytes": {
                "done": seen.done_bytes,
                "total": seen.work_bytes,
                "per_s": seen.bytes_per_s if is_at_work else 0.0,
                "mean_per_s": seen.mean_bytes_per_s,
            },
            "seconds_left": seen.seconds_left if word == "running" else None,
            "retries": seen.retries,
            "machines": [asdict(each) for each in seen.machines],
            "flying": [asdict(each) for each in seen.flying] if is_at_work else [],
            "failures": dict(seen.failed),
        }
    return document


def _word(report: Report | None, journal: JournalState | None) -> Word:
    if journal is None:
        return "complete"
    is_published = journal.life is not None and journal.life.state == "published"
    if report is not None and (is_published or journal.word not in AT_WORK):
        return "complete"  # what is left is of another request for it, or of a job that ended a moment ago
    return journal.word


def _driver(life: Life, sign_age_s: float | None) -> dict[str, Any]:
    return {
        "host": life.host,
        "pid": life.pid,
        "started": _utc(life.started),
        "last_sign": _utc(life.told),
        "last_sign_age_s": sign_age_s,
        "every_s": life.every_s,
        "left_as": None if life.state == "running" else life.state,
        "cluster": life.cluster,
        "jobs_in_pass": life.jobs_in_pass,
        "units_resumed": life.units_resumed,
        "versions": dict(life.versions),
    }


def _utc(seconds: float) -> str | None:
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    # A sign that somebody else wrote may say any number.
    except (OverflowError, ValueError, OSError):
        return None


def _command(journal: JournalState, output: Address) -> str | None:
    """Return the command that goes on with a job; None if its journal does not say what was asked for."""
    request = (journal.request or {}).get("request")
    if not isinstance(request, Mapping):
        return None
    try:
        return rerun_of(request, str(output))
    # The request of another version, or one that somebody wrote.
    except (KeyError, TypeError, ValueError, AttributeError, WeightmillError):
        return None


def report_document(report: Report) -> dict[str, Any]:
    """Describe a finished output in brief."""
    total, run = report.totals, report.run
    return {
        "model": model_of(report.job, report.source.path),
        "quant": named(report.job, "quant"),
        "output_bytes": total.output_bytes,
        "bits_per_weight": total.bits_per_weight,
        "relative_error": total.relative_error,
        "started": run.started,
        "wall_s": run.wall_s,
        "units": run.units,
        "nodes": list(run.nodes),
        "warnings": len(report.warnings),
    }


def named(request: Mapping[str, Any], group: str) -> str | None:
    part = request.get(group)
    name = part.get("name") if isinstance(part, Mapping) else None
    return name if isinstance(name, str) else None


def model_of(request: Mapping[str, Any], source: str | None) -> str | None:
    """Return the name of a request's model, or of where it was read."""
    if (name := named(request, "model")) is not None:
        return name
    try:
        return None if not source else Address.of(source).title
    except BadSpec:
        return None


# --- list


def listed(root: Address) -> Said:
    """List the outputs and the journals in a folder of outputs.

    Raises:
        BadSpec: there is no such folder, or its kind of store has no folders.
        StorageError: it cannot be listed.
    """
    names = kind_of(root).folders(root, MOST_OUTPUTS + 1)
    more, names = len(names) > MOST_OUTPUTS, names[:MOST_OUTPUTS]
    by_output: dict[str, JournalState] = {}
    for state in _journals(root, names):
        by_output.setdefault(state.output, state)  # the newest is first
    places = {str(root / name): root / name for name in names}
    places |= {output: Address.of(output) for output in by_output if output not in places}
    if root.scheme != "hf":
        places[str(root)] = root  # it may be an output itself
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda place: _row(place, by_output.get(str(place))), places.values()))
    found = sorted((row for row in rows if row is not None), key=lambda row: str(row["output"]))
    said = f"the first {counted(MOST_OUTPUTS, 'folder')} alone were looked into" if more else ""
    document = {"status": "done", "root": str(root), "is_cut": more, "outputs": found}
    return Said(document, list_text(str(root), found, said))


def _journals(root: Address, names: Sequence[str]) -> list[JournalState]:
    """Return the journals in a folder of outputs. In a store each is below its output, and looked for there."""
    if root.is_local or root.scheme == "hf":
        return journals_in(root)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [state for states in pool.map(lambda name: journals_in(root, name), names) for state in states]


def _row(output: Address, journal: JournalState | None) -> dict[str, Any] | None:
    """Return the row of an output; None for a folder that is none."""
    fault = "" if journal is None else journal.fault
    try:
        report = report_of(output)
    except WeightmillError as error:
        report, fault = None, str(error).removeprefix("output.path: ")
    if report is None and journal is None and not fault:
        return None
    request: Mapping[str, Any] = (journal.request or {}).get("request") or {} if journal is not None else {}
    about = report_document(report) if report is not None else {}
    life = None if journal is None else journal.life
    return {
        "output": str(output),
        "state": "damaged" if report is None and journal is None else _word(report, journal),
        "model": about.get("model") or model_of(request, _path_of(request)),
        "quant": about.get("quant") or named(request, "quant"),
        "bytes": about.get("output_bytes") if report is not None else None if journal is None else journal.size,
        "bits_per_weight": about.get("bits_per_weight"),
        "when": about.get("started") or (None if life is None else _utc(life.started)),
        "units_done": None if report is not None or journal is None else journal.units_done,
        "units": about.get("units") if report is not None else None if journal is None else journal.units,
        "fault": fault,
    }


def _path_of(request: Mapping[str, Any]) -> str | None:
    model = request.get("model")
    path = (model.get("path") or model.get("hub_id")) if isinstance(model, Mapping) else None
    return path if isinstance(path, str) else None
