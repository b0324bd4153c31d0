"""What every verb shares: taking a request from the command line, saying what came of it, the exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TextIO, TypeVar

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.text import Text

from jobs.compose import Request, check, compose, sweep, take_apart
from loaders.errors import BadSpec, WeightmillError

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class Said:
    """What a verb has to say: a document for machines, a text for people, and whether all is well."""

    document: dict[str, Any]
    text: RenderableType
    status: int = DONE
    then: Callable[[], None] = lambda: None  # the very last act, after all is said


@dataclass(frozen=True)
class Verb(Generic[S]):
    """A command. `positional` names the keys that bare arguments fill, in order."""

    name: str
    summary: str
    spec: type[S]
    act: Callable[[S], Said]
    examples: tuple[tuple[str, str], ...]
    positional: tuple[str, ...] = ()
    can_sweep: bool = False
    config: str = ""

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command; returns the exit status."""
        given = list(sys.argv[1:] if arguments is None else arguments)
        as_json = "format=json" in given
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as for Ctrl-C
        try:
            return self._main(self._named(given), as_json)
        except BadSpec as error:
            return _complain(WRONG, error.problems, as_json)
        except WeightmillError as error:
            return _complain(FAILED, [str(error)], as_json)
        except KeyboardInterrupt as error:
            return _complain(INTERRUPTED, [str(error) or "interrupted"], as_json)
        except BrokenPipeError:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # what is still buffered has no reader
            return FAILED
        except OSError as error:
            return _complain(FAILED, [str(error)], as_json)

    def _named(self, given: list[str]) -> list[str]:
        """Bare arguments under the names of their keys."""
        names = list(self.positional)
        return [f"{names.pop(0)}={a}" if names and "=" not in a and not a.startswith(("-", "~")) else a for a in given]

    def _main(self, given: list[str], as_json: bool) -> int:
        request = take_apart(self.config or self.name, given)
        if request.wants_help:
            from jobs.help import help_text

            print(help_text(self))
            return DONE
        if request.is_sweep:
            return self._sweep(request, as_json)
        if request.flags:
            raise BadSpec(f"{request.flags[0]}: unknown option; options are key=value, and --help{self._sweep_hint}")
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # libraries print, too
            said = self.act(compose(self.config or self.name, self.spec, request))
        return say(said, as_json)

    @property
    def _sweep_hint(self) -> str:
        return ", -m" if self.can_sweep else ""

    def _sweep(self, request: Request, as_json: bool) -> int:
        if not self.can_sweep:
            raise BadSpec(f"-m: {self.name} does one thing at a time; only run sweeps")
        others = [flag for flag in request.flags if flag not in ("-m", "--multirun")]
        if others:
            raise BadSpec(f"{others[0]}: unknown option")
        outcomes = Outcomes(as_json=as_json)

        def one(values: dict[str, Any], suffix: str) -> float | None:
            output = values.get("output")
            if suffix and isinstance(output, dict) and output.get("path") is None:
                values = {**values, "output": {**output, "suffix": suffix}}
            return outcomes.add(suffix, lambda: self.act(check(self.spec, values)))

        try:
            with redirect_stdout(sys.stderr) if outcomes.as_json else nullcontext():
                sweep(self.config or self.name, request, one)
        except KeyboardInterrupt as error:
            outcomes.failed(INTERRUPTED, [str(error) or "interrupted"])
        return outcomes.finish()


@dataclass
class Outcomes:
    """What came of a sweep's jobs, one after another: one that fails does not end the others."""

    as_json: bool
    documents: list[dict[str, Any]] = field(default_factory=list)
    status: int = DONE

    def add(self, suffix: str, act: Callable[[], Said]) -> float | None:
        note(f"--- job {len(self.documents) + 1}{' ' if suffix else ''}{suffix.lstrip('-')}")
        try:
            said = act()
        except BadSpec as error:
            return self.failed(WRONG, error.problems)
        except WeightmillError as error:
            return self.failed(FAILED, [str(error)])
        self.documents.append(said.document)
        self.status = max(self.status, said.status)
        if self.as_json:
            said.then()
        else:
            say(said, False)
        objective = (said.document.get("totals") or {}).get("bits_per_weight")
        return float(objective) if objective is not None else None

    def failed(self, status: int, problems: Sequence[str]) -> float | None:
        self.documents.append({"status": "failed", "exit_status": status, "problems": list(problems)})
        self.status = max(self.status, status)
        if not self.as_json:
            _complain(status, problems, False)
        return None

    def finish(self) -> int:
        if self.as_json:
            print(json.dumps({"jobs": self.documents}, indent=2))
        else:
            lines = [f"  {index}: {_outcome(document)}" for index, document in enumerate(self.documents, 1)]
            print("\n".join([f"{len(lines)} jobs:", *lines]))
        return self.status


def _outcome(document: dict[str, Any]) -> str:
    if document.get("exit_status", 0):
        return f"FAILED: {document['problems'][0]}"
    total = document["totals"]
    error = (total["changed"] or total)["relative_error"]
    return f"{document['output']}: {total['bits_per_weight']:.2f} bits a weight, relative error {error:.5f}"


def note(text: str) -> None:
    """Something worth knowing now, on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(text))


def show(text: RenderableType) -> None:
    """Something for people, on standard error: standard output is kept for the result."""
    Console(stderr=True, highlight=False, width=_width(sys.stderr)).print(text)


def say(said: Said, as_json: bool) -> int:
    """Print a verb's result on standard output."""
    if as_json:
        print(json.dumps(said.document, indent=2, ensure_ascii=False))
    else:
        Console(highlight=False, width=_width(sys.stdout)).print(said.text)
    sys.stdout.flush()
    said.then()
    return said.status


def leave(status: int) -> NoReturn:
    """End the process now. All work is done and synced; taking the interpreter down would only take a while longer,
    in which a kill would make a finished job look unfinished.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _width(stream: TextIO) -> int | None:
    """A terminal's own; elsewhere wide enough that nothing is folded."""
    return None if stream.isatty() else 240


def _complain(status: int, problems: Sequence[str], as_json: bool) -> int:
    if as_json:
        print(json.dumps({"status": "failed", "exit_status": status, "problems": list(problems)}, indent=2))
    lead = {WRONG: "this cannot be done", INTERRUPTED: "stopped"}.get(status, "failed")
    if len(problems) == 1:
        print(f"weightmill: {lead}: {problems[0]}", file=sys.stderr)
    else:
        print(f"weightmill: {lead}, {len(problems)} problems:", file=sys.stderr)
        for problem in problems:
            print(f"  {problem}", file=sys.stderr)
    return status
