"""The base of all verbs: composing a request from the command line, printing the result, the exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from pydantic import BaseModel

from jobs.cli.arguments import bare_value
from jobs.cli.compose import FLAGS, Request, compose, take_apart
from jobs.cli.console import ALL_COLUMNS, console, patient_streams
from jobs.cli.early import imported, limit_of
from jobs.cli.home import have_home, have_temporary_folder
from jobs.cli.listening import LISTENER
from jobs.cli.literals import literal, verbatim
from jobs.spec.keys import KEYS
from jobs.spec.store import StoreSpec
from loaders.errors import BadSpec, WeightmillError, settings_called
from loaders.storage.address import without_secrets
from loaders.storage.settings import use
from loaders.words import UNSHOWN, in_a_line

if TYPE_CHECKING:
    from rich.console import RenderableType

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
SHOWN = 20  # problems that are printed; what is wrong with thousands of tensors is seen from the first
S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class Said:
    """The result of a verb: a document for programs, a text for people, and the exit status.

    `made` is the document, or makes it if it is asked for, where it is large. `value` is what the verb made, for a
    program in this process.
    """

    made: dict[str, Any] | Callable[[], dict[str, Any]]
    text: RenderableType
    status: int = DONE
    then: Callable[[], None] = lambda: None  # called last, after the result was printed
    value: Any = None

    @property
    def document(self) -> dict[str, Any]:
        return self.made() if callable(self.made) else self.made


@dataclass(frozen=True, kw_only=True)
class Verb(Generic[S]):
    """A command. `positional` lists the keys that paths without a key set, in order; `gathered` is the key of a list,
    which all further ones are put into.

    `located` replaces addresses of sources that no store knows by those that one does, and tells the user about it.
    `is_said` says that what it prints is all that it does.
    """

    name: str
    summary: str
    spec: type[S]
    act: Callable[[S], Said]
    examples: tuple[tuple[str, str], ...]
    positional: tuple[str, ...] = ()
    gathered: str | None = None
    sweep: Callable[[str, Request], Said] | None = None
    config: str = ""
    is_said: bool = True
    located: Callable[[S, Callable[[str], None]], S] = lambda spec, tell: spec

    @property
    def can_sweep(self) -> bool:
        return self.sweep is not None

    @property
    def _has_columns(self) -> bool:
        """Whether it has the setting `columns` of tables; to bench the word means those of a matrix."""
        field = self.spec.model_fields.get("columns")
        return field is not None and field.default == "fit"

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command and return the exit status."""
        given = list(sys.argv[1:] if arguments is None else arguments)
        ALL_COLUMNS.set("columns=all" in given if self._has_columns else None)
        with patient_streams() as lost:
            status = self._checked(given, as_json="format=json" in given)
            # Jobs, and whatever else leaves something behind, have done their work.
            if self.is_said and not status and (reason := lost()):
                return _complain(FAILED, [f"standard output: {reason}; what was to be printed is lost"], as_json=False)
            return status

    def _checked(self, given: list[str], *, as_json: bool) -> int:
        # Schedulers stop jobs by SIGTERM, and a terminal that closes does so by SIGHUP, which nohup has ignored. They
        # then raise KeyboardInterrupt like Ctrl-C, so that `finally` blocks run.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.default_int_handler)
        imported()
        try:
            have_home()
            with settings_called(KEYS):
                return self._main(self._named(given), as_json)
        except BadSpec as error:
            return _complain(WRONG, error.problems, as_json, error.remedy)
        except WeightmillError as error:
            return _complain(FAILED, [str(error)], as_json)
        except KeyboardInterrupt as error:
            return _complain(INTERRUPTED, [str(error) or "interrupted"], as_json)
        except (OSError, MemoryError, RuntimeError, ImportError, SystemError) as error:
            said = limit_of(error) or (str(error) if isinstance(error, OSError) else None)
            if said is None:
                raise
            return _complain(FAILED, [said], as_json)

    def _named(self, given: list[str]) -> list[str]:
        """Give arguments that are values alone the names of the positional keys."""
        names, gathered, found = list(self.positional), list[str](), list[str]()
        for before, word in zip(["", *given], given, strict=False):
            # What follows another tool's option is the option's value, which is told with it.
            is_value = before.startswith("-") and before not in FLAGS and "=" not in before
            value = (
                None if is_value else bare_value(word, self.config or self.name, self.spec, only_paths=self.can_sweep)
            )
            if value is not None and names:
                found.append(f"{names.pop(0)}={value}")
            elif value is not None and self.gathered is not None:
                gathered.append(value)
            else:
                found.append(word)
        return [*found, f"{self.gathered}={literal([verbatim(value) for value in gathered])}"] if gathered else found

    def _main(self, given: list[str], as_json: bool) -> int:
        request = take_apart(self.config or self.name, self.spec, given)
        if request.wants_help:
            from jobs.cli.help import help_text

            print(help_text(self, request.folders))
            return DONE
        if request.is_sweep:
            return self._sweep(request, as_json)
        # Libraries print to standard output, which must hold nothing but the document.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            said = self.answer(request)
        return say(said, as_json)

    def answer(self, request: Request) -> Said:
        """Compose a request and act on it; nothing of the result is printed.

        Raises:
            WeightmillError: the request is wrong, or what it asks for failed.
        """
        spec = compose(self.config or self.name, self.spec, request)
        have_temporary_folder(spec)
        reach_stores(spec)
        return self.act(self.located(spec, note))

    def _sweep(self, request: Request, as_json: bool) -> int:
        if self.sweep is None:
            raise BadSpec(
                f"-m: {self.name} does one thing at a time: give it one of the choices; weightmill run -m sweeps, and"
                " says what its plans warn of before it begins"
            )
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            said = self.sweep(self.config or self.name, request)
        return say(said, as_json)


def reach_stores(spec: BaseModel) -> None:
    """Make a request's settings of stores, if it has some, those of this process."""
    settings = getattr(spec, "store_settings", None)
    if settings is None and isinstance(store := getattr(spec, "store", None), StoreSpec):
        cluster = getattr(spec, "cluster", None)
        settings = replace(store.settings, read_limit=getattr(cluster, "read_limit", None))
    if settings is not None:
        use(settings)


def note(text: str) -> None:
    """Print a note for the user on standard error; on a terminal its lines end between words.

    A program that runs the job in this process gets it instead.
    """
    text = in_a_line(without_secrets(text))
    if (listener := LISTENER.get()) is not None:
        listener.note(text)
        return
    to = console(sys.stderr)
    if to.is_terminal:
        style: dict[str, Any] = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
        text = "\n".join(wrap(text, to.width, **style))
    to.print(text, soft_wrap=True)


def show(text: RenderableType) -> None:
    """Print something for people on standard error; standard output is only for the result."""
    if LISTENER.get() is None:
        console(sys.stderr).print(text)


def say(said: Said, as_json: bool) -> int:
    """Print a verb's result on standard output, call its `then`, and return the exit status."""
    if as_json:
        _print_json(said.document)
    else:
        console(sys.stdout).print(said.text, crop=False)
    sys.stdout.flush()
    said.then()
    return said.status


def _print_json(document: Any) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # In JSON such characters stand within quotes alone.
    # Half a character is none in JSON: many readers refuse its escape, so that is shown as text.
    print(UNSHOWN.sub(lambda found: ("\\\\u" if found[0] >= "\ud800" else "\\u") + f"{ord(found[0]):04x}", text))


def leave(status: int) -> NoReturn:
    """End the process at once, without the interpreter's shutdown.

    All work is done and synced. The shutdown would only take longer, and if the process were killed during it, a
    finished job would have the exit status of a failed one.
    """
    for stream in (sys.stdout, sys.stderr):
        # The reader has closed the pipe, or the disk is full; the result was computed all the same.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def _complain(status: int, problems: Sequence[str], as_json: bool, remedy: str = "") -> int:
    # What a user typed may be quoted, and what libraries say.
    problems, remedy = [in_a_line(without_secrets(problem)) for problem in problems], in_a_line(without_secrets(remedy))
    if as_json:
        said = [*problems, *([remedy] if remedy else [])]
        _print_json({"status": "failed", "exit_status": status, "problems": said})
    lead = {WRONG: "this cannot be done", INTERRUPTED: "stopped"}.get(status, "failed")
    if len(problems) == 1:
        print(f"weightmill: {lead}: {problems[0]}", file=sys.stderr)
    else:
        print(f"weightmill: {lead}, {len(problems)} problems:", file=sys.stderr)
        for problem in problems[:SHOWN]:
            print(f"  {problem}", file=sys.stderr)
        if len(problems) > SHOWN:
            print(f"  and {len(problems) - SHOWN} more, which format=json lists", file=sys.stderr)
    if remedy:
        print(f"  {remedy}", file=sys.stderr)
    return status
