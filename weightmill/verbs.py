"""The verbs as functions: `weightmill.run(model="llama70b", quant="nf4", output="OUT")`.

Settings are those of the command line, by the same names, as Python values: by keyword, in a mapping
({"quant.group_size": 64}), or in mappings within mappings. Nothing is printed, no handler of a signal is set, and no
process is ended. Jobs of one process run one after another, whatever threads they are called from: each has all of the
machine, and the settings of stores are of a process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from jobs.cli.home import have_home
from jobs.cli.listening import Listener, listening
from jobs.cli.verb import Said, Verb
from jobs.spec.keys import IN_PYTHON
from loaders.errors import BadSpec, settings_called
from loaders.progress import OnProgress
from loaders.storage.settings import current, use
from weightmill.request import is_sweep, request_of
from weightmill.results import JobPlan, JobResult, LintResult, Result, StatusResult, SweepResult, VerifyResult

Settings = Mapping[str, Any]
PathLike = str | os.PathLike[str]
# A progress function of a job may itself ask for something; another thread waits.
_TURN = threading.RLock()
R = TypeVar("R")
# Settings of one job, to a checker: lists are of sweeps, or of `rules`.
One = PathLike | float | bool | None | Mapping[str, "One"]


@overload
def run(
    settings: Settings | None = None, /, *, quant: list[str] | tuple[str, ...], model: PathLike | None = None,
    progress: OnProgress | bool = False, **others: Any,
) -> SweepResult: ...  # fmt: skip
@overload
def run(
    settings: Mapping[str, One] | None = None, /, *, model: PathLike | None = None,
    quant: str | Mapping[str, One] | None = None, experiment: None = None, progress: OnProgress | bool = False,
    **others: One,
) -> JobResult: ...  # fmt: skip
@overload
def run(
    settings: Settings | None = None, /, *, model: PathLike | None = None,
    quant: str | list[str] | tuple[str, ...] | Settings | None = None, progress: OnProgress | bool = False,
    **others: Any,
) -> JobResult | SweepResult: ...  # fmt: skip
def run(
    settings: Settings | None = None,
    /,
    *,
    model: PathLike | None = None,
    quant: str | list[str] | tuple[str, ...] | Settings | None = None,
    progress: OnProgress | bool = False,
    **others: Any,
) -> JobResult | SweepResult:
    """Quantize a checkpoint as `weightmill run` does, and return the job's result, or that of a sweep.

    model: a preset ("llama70b"), a folder, or a URL ("hf://OWNER/NAME"). quant: a preset, or a mapping of its name and
    settings; a list is a sweep, and so is one for any other setting that takes one value, and an experiment that has
    such. output: the folder of the output. progress: a function that is called with a `Progress`, by one thread at a
    time, or True to print it as the command does.

    The same call again goes on where it was interrupted, and does nothing if the output is there.

    Raises:
        BadSpec: the request is wrong, or the job cannot be done; nothing was written.
        BadCheckpoint: the source is damaged.
        VerifyFailed: the output would not be right, and was not published.
        StorageError: reading or writing failed.
        KeyboardInterrupt: it was interrupted; finished units stay.
        Whatever `progress` raises: the job stops, and its finished units stay.
    """
    from jobs.run import VERB

    def job(said: Said, notes: tuple[str, ...]) -> JobResult | SweepResult:
        if not isinstance(said.value, dict):
            return _job(said, notes)
        done = {name: _job(each, ()) for name, each in said.value.items() if isinstance(each, Said)}
        failures = {name: each for name, each in said.value.items() if not isinstance(each, Said)}
        return SweepResult(said=said, notes=notes, jobs=done, failures=failures)

    return _ask(VERB, _all(settings, others, model=model, quant=quant), job, progress)


def plan(
    settings: Settings | None = None,
    /,
    *,
    model: PathLike | None = None,
    quant: str | Settings | None = None,
    **others: Any,
) -> JobPlan:
    """Say exactly what `run` would do with the same settings, by reading headers alone; nothing is written.

    Raises:
        As `run`.
    """
    from jobs.plan import VERB

    asked = _all(settings, others, model=model, quant=quant)
    return _ask(VERB, asked, lambda said, notes: JobPlan(said=said, notes=notes))


def verify(
    output: PathLike | None = None,
    settings: Settings | None = None,
    *,
    model: PathLike | None = None,
    progress: OnProgress | bool = False,
    **others: Any,
) -> VerifyResult:
    """Verify an output again, as `weightmill verify` does: every file's hash, every tensor decoded and compared.

    model: the source, if it is not where it was. verify="logits" judges what it computes, too. What is wrong is in the
    result's `faults`: bool() of the result is whether it is right, and `raise_for_faults()` makes an exception of it.

    Raises:
        BadSpec: there is no output, or its source is not there, or another.
        BadCheckpoint: a file is so damaged that it cannot be opened.
        StorageError: a file cannot be read.
    """
    from jobs.verify import VERB

    asked = _all(
        settings, others, output=_place("output", output), model=None if model is None else _place("model", model)
    )

    def found(said: Said, notes: tuple[str, ...]) -> VerifyResult:
        document = said.document
        return VerifyResult(
            said=said, notes=notes, output=document["output"], source=document["source"], tensors=document["tensors"],
            faults=tuple(document["faults"]), quality=document.get("quality"),
        )  # fmt: skip

    return _ask(VERB, asked, found, progress)


def inspect(model: PathLike | None = None, settings: Settings | None = None, **others: Any) -> Result:
    """Say what a checkpoint holds, as `weightmill inspect` does: `document` has tensors, roles, dtypes, sizes, ties.

    Raises:
        BadSpec, BadCheckpoint: there are no weights, or they are damaged.
    """
    from jobs.inspect import VERB

    return _ask(VERB, _all(settings, others, model=_place("model", model)), _result)


def lint(output: PathLike | None = None, settings: Settings | None = None, **others: Any) -> LintResult:
    """Say what an engine will fail on in a checkpoint, as `weightmill lint` does: `faults`, and `document` has all
    findings. bool() of the result is whether there are no faults.

    Raises:
        BadSpec, BadCheckpoint: there are no weights, or they are damaged.
    """
    from jobs.lint import VERB

    def found(said: Said, notes: tuple[str, ...]) -> LintResult:
        faults = [
            f"{each['what']}; {each['engine']}: {each['happens']}; {each['remedy']}"
            for each in said.document["findings"]
            if each["level"] == "fault"
        ]
        return LintResult(said=said, notes=notes, output=said.document["output"], faults=tuple(faults))

    return _ask(VERB, _all(settings, others, output=_place("output", output)), found)


def compare(*runs: PathLike, settings: Settings | None = None, **others: Any) -> Result:
    """Compare outputs by their folders, or runs of MLflow, as `weightmill compare` does; none: the last sweep's.

    Raises:
        BadSpec: there is no such output or run.
        StorageError: the store of runs cannot be read.
    """
    from jobs.compare import VERB

    if wrong := [each for each in runs if not isinstance(each, str | os.PathLike)]:
        raise BadSpec(
            f"runs: expected folders of outputs or names of runs, found {type(wrong[0]).__name__}; give each as an"
            " argument of its own: compare(*runs)"
        )
    return _ask(VERB, _all(settings, others, runs=[os.fspath(each) for each in runs] or None), _result)


def status(output: PathLike | None = None, settings: Settings | None = None, **others: Any) -> StatusResult:
    """Say how a job or an output stands, as `weightmill status` does: from its journal, on any machine, at any time.

    Raises:
        BadSpec: there is neither an output nor a journal of one.
        StorageError: the place cannot be read.
    """
    from jobs.status import VERB

    def found(said: Said, notes: tuple[str, ...]) -> StatusResult:
        document = said.document
        units = document["units"] or {}
        return StatusResult(
            said=said, notes=notes, output=document["output"], state=document["state"], units_done=units.get("done"),
            units=units.get("total"),
        )  # fmt: skip

    return _ask(VERB, _all(settings, others, output=_place("output", output)), found)


def list_outputs(root: PathLike | None = None, settings: Settings | None = None, **others: Any) -> Result:
    """List the outputs and unfinished jobs in a folder, as `weightmill list` does: `document["outputs"]` has them.

    root: ./outputs by default.

    Raises:
        StorageError: it cannot be listed.
    """
    from jobs.list import VERB

    where = None if root is None else {"root": _place("root", root)["path"]}
    return _ask(VERB, _all(settings, others, output=where), _result)


def track(output: PathLike | None = None, settings: Settings | None = None, **others: Any) -> Result:
    """Send a finished output's numbers to MLflow, as `weightmill track` does; twice is harmless.

    Raises:
        BadSpec: there is no output.
        StorageError: MLflow did not take all of it.
    """
    from jobs.track import VERB

    return _ask(VERB, _all(settings, others, output=_place("output", output)), _result)


def _result(said: Said, notes: tuple[str, ...]) -> Result:
    return Result(said=said, notes=notes)


def _job(said: Said, notes: tuple[str, ...]) -> JobResult:
    document = said.document
    untracked = ("the output is complete, but MLflow has not all of it",) if said.status else ()
    return JobResult(
        said=said, notes=(*notes, *untracked), report=said.value,
        **{key: document[key] for key in ("output", "already", "tracked", "registered")},
    )  # fmt: skip


def _all(settings: Settings | None, others: Settings, **named: Any) -> tuple[Settings, ...]:
    """Return all settings that were given; None by keyword is not given.

    Raises:
        BadSpec: `settings` are no mapping.
    """
    if settings is not None and not isinstance(settings, Mapping):
        found = repr(settings)[:80] if isinstance(settings, str | os.PathLike) else type(settings).__name__
        raise BadSpec(
            "settings: expected a mapping by names of settings, such as {'quant.group_size': 64},"
            f" found {found}; give values by their names, such as model='demo'"
        )
    return settings or {}, {key: value for key, value in named.items() if value is not None}, others


def _place(name: str, value: Any) -> dict[str, Any]:
    """Return the setting of the checkpoint that a verb is about.

    Raises:
        BadSpec: it is missing, or no path.
    """
    if value is None:
        raise BadSpec(
            f"{name}: expected the path or URL of a checkpoint, found none; give it first, or as {name}='DIR'"
        )
    if not isinstance(value, str | os.PathLike):
        raise BadSpec(f"{name}: expected the path or URL of a checkpoint, found {type(value).__name__}")
    return {"path": value}


def _ask(
    verb: Verb[Any],
    settings: tuple[Settings, ...],
    made: Callable[[Said, tuple[str, ...]], R],
    progress: OnProgress | bool = False,
) -> R:
    """Run a verb in this process, and return what is made of its result and of its notes.

    Raises:
        BadSpec: `progress` can neither be called nor is it True or False.
    """
    if not callable(progress) and not isinstance(progress, bool):
        raise BadSpec(f"progress: expected a function that takes a Progress, True or False, found {progress!r:.80}")
    listener = Listener(progress if callable(progress) else None, shows_progress=progress is True)
    with _TURN, listening(listener), settings_called(IN_PYTHON):
        before = current()
        try:
            have_home()
            request = request_of(verb, *settings)
            said = _sweep(verb, request) if is_sweep(verb, request) else verb.answer(request)
            result = made(said, tuple(listener.notes))
            said.then()
            return result
        finally:
            use(before)


def _sweep(verb: Verb[Any], request: Any) -> Said:
    from jobs.cli.multirun import product
    from jobs.orchestration.sweep import run_sweep

    return run_sweep(verb.config or verb.name, request, product)
