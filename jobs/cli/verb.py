"""What every verb shares: taking a request from the command line, saying what came of it, the exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TextIO, TypeVar

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.text import Text

from jobs.cli.compose import Request, compose, take_apart
from jobs.spec.keys import KEYS
from loaders.errors import BadSpec, WeightmillError, settings_called

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class Said:
    """What a verb has to say: a document for machines, a text for people, and whether all is well."""

    document: dict[str, Any]
    text: RenderableType
    status: int = DONE
    then: Callable[[], None] = lambda: None  # the very last act, after all is said


@dataclass(frozen=True, kw_only=True)
class Verb(Generic[S]):
    """A command. `positional` names the keys that bare arguments fill, in order."""

    name: str
    summary: str
    spec: type[S]
    act: Callable[[S], Said]
    examples: tuple[tuple[str, str], ...]
    positional: tuple[str, ...] = ()
    sweep: Callable[[str, Request], Said] | None = None
    config: str = ""

    @property
    def can_sweep(self) -> bool:
        return self.sweep is not None

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command; returns the exit status."""
        given = list(sys.argv[1:] if arguments is None else arguments)
        as_json = "format=json" in given
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as for Ctrl-C
        try:
            with settings_called(KEYS):
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
        request = take_apart(self.config or self.name, self.spec, given)
        if request.wants_help:
            from jobs.cli.help import help_text

            print(help_text(self, request.folders))
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
        if self.sweep is None:
            raise BadSpec(f"-m: {self.name} does one thing at a time; only run sweeps")
        others = [flag for flag in request.flags if flag not in ("-m", "--multirun")]
        if others:
            raise BadSpec(f"{others[0]}: unknown option")
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            said = self.sweep(self.config or self.name, request)
        return say(said, as_json)


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
        Console(highlight=False, width=_width(sys.stdout)).print(said.text, crop=False)
    sys.stdout.flush()
    said.then()
    return said.status


def leave(status: int) -> NoReturn:
    """End the process now. All work is done and synced; taking the interpreter down would only take a while longer,
    in which a kill would make a finished job look unfinished.
    """
    with suppress(BrokenPipeError):  # a reader that has left
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
