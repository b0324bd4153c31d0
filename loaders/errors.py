"""The exceptions of weightmill: one class for each case that a caller would handle differently.

Every message says what is wrong, where, what was expected, what was found, and what to do.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_NAMES: list[Mapping[str, str]] = []  # of the blocks that are open now, in all threads; the last one counts

LEAVE = "leave it out, or let a job keep it by a rule"  # what there is to do about a tensor; a setting's name, too


def setting(name: str) -> str:
    """What a setting is called in a message: by the library's name, or as the program says that runs it."""
    return next((names[name] for names in reversed(_NAMES) if name in names), name)


@contextmanager
def settings_called(names: Mapping[str, str]) -> Iterator[None]:
    """Within the block, messages of this process call the library's settings by these names.

    A program whose users know settings by other names, such as keys of a config file, says so here.
    """
    _NAMES.append(names)
    try:
        yield
    finally:
        _NAMES.remove(names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, as its `text` says it: "WHERE: expected A, found B; what to do".

    where: the setting, file or tensor. what: the text without that and without the hint. expected, found: of the
    value; texts without quotes, of a failed gate the limit and the measured number. hint: what to do. None for what the
    text does not say.
    """

    text: str
    where: str | None
    what: str
    expected: str | None
    found: str | None
    hint: str | None

    @staticmethod
    def of(text: str) -> Problem:
        """Take a message apart."""
        said, *rest = _parts(text.removeprefix("not published: "), "; ")
        lead, colon, after = _cut(said, ": ")
        place = _PLACE.fullmatch(lead) if colon else None
        what, where = (after, place[1]) if place else (said, None)
        # What was found may stand at the end, after what to do.
        ends = [part for part in rest if part.startswith("found ")]
        says_expected, says_found = _EXPECTED.search(what), _FOUND.search("; ".join([what, *ends]))
        expected, found = says_expected and says_expected[1], says_found and _unquoted(says_found[1])
        if unknown := _UNKNOWN.search(what):
            found = _unquoted(unknown[1]) if unknown[1] else unknown[2] or where
        elif limit := _LIMIT.search(what):
            where, found = where or limit["setting"], limit["found"]
            expected = f"at {'least' if limit['side'] == 'below' else 'most'} {limit['most'] or limit['limit']}"
        hint = "; ".join(part for part in rest if part not in ends)
        return Problem(text=text, where=where, what=what, expected=expected, found=found, hint=hint or None)


# A setting, a file or settings of a job; "making PATH", where a file could not be made.
_PLACE = re.compile(r"(?:\w+ing (?=\S*/))?(\S+|/.*|(?:[\w.]+=\S+ ?)+)")
_EXPECTED = re.compile(r"\bexpected (.+?)(?:,? (?:but )?found\b|$)", re.DOTALL)
_FOUND = re.compile(r"\bfound (.+)$", re.DOTALL)
# A choice is told with what was found; an unknown key is it itself.
_UNKNOWN = re.compile(r"\bunknown (?:\w+ )?('[^']*'|\"[^\"]*\")|(?:(\S+): )?\bunknown key\b")
# Of a gate: of a tensor's error, or of what an output computes.
_LIMIT = re.compile(
    r" (?P<found>\d[\d.e+-]*|nan|inf)(?: \([^)]*\))?, (?:at most (?P<most>\S+) allowed"
    r"|(?P<side>above|below) (?P<setting>[\w.]+)=(?P<limit>\d[\d.e+-]*?)(?=\.? |\.?$))"
)


def _unquoted(text: str) -> str:
    """Return the text that a message quotes; what is no quoted text stays as it is."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or text[0] in text[1:-1].replace(r"\"", ""):
        return text
    if text[0] == "'":
        return text[1:-1]
    try:
        return str(json.loads(text))
    except ValueError:
        return text[1:-1]


def _cut(text: str, mark: str) -> tuple[str, str, str]:
    """Cut a text at the first mark that is in no parentheses and no quotes."""
    depth, quote = 0, ""
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in '"`' or (letter == "'" and (at == 0 or not text[at - 1].isalnum())):
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif depth <= 0 and text.startswith(mark, at):
            return text[:at], mark, text[at + len(mark) :]
    return text, "", ""


def _parts(text: str, mark: str) -> list[str]:
    first, found, rest = _cut(text, mark)
    return [first, *_parts(rest, mark)] if found else [first]


class WeightmillError(Exception):
    """The base of all errors that are not bugs in weightmill. `details` are the parts of what the text says."""

    @property
    def details(self) -> tuple[Problem, ...]:
        """Everything that is wrong, one by one."""
        return tuple(Problem.of(line) for line in str(self).splitlines() if line.strip())

    @property
    def where(self) -> str | None:
        """The setting, file or tensor of the first thing that is wrong; None if the text does not say it."""
        return self.details[0].where if self.details else None

    @property
    def expected(self) -> str | None:
        """What was expected there."""
        return self.details[0].expected if self.details else None

    @property
    def found(self) -> str | None:
        """What was found there."""
        return self.details[0].found if self.details else None

    @property
    def hint(self) -> str | None:
        """What to do about it."""
        return self.details[0].hint if self.details else None


class BadSpec(WeightmillError):
    """The request is wrong, and nothing was started. `problems` holds all faults that were found.

    `remedy` says what could be done instead, where that is not of one fault.
    """

    def __init__(self, problems: str | Sequence[str], remedy: str = "") -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        self.remedy = remedy
        super().__init__("\n".join([*self.problems, *([remedy] if remedy else [])]))

    @property
    def details(self) -> tuple[Problem, ...]:
        return tuple(Problem.of(problem) for problem in self.problems)

    @property
    def hint(self) -> str | None:
        return super().hint or self.remedy or None

    def __reduce__(self) -> tuple[type[BadSpec], tuple[tuple[str, ...], str]]:
        # By default an exception is unpickled from its `args`, here the joined text, which would lose the separate
        # problems on the way back from a worker process.
        return type(self), (self.problems, self.remedy)


class MissingFile(BadSpec, FileNotFoundError):
    """Nothing is where the request says that weights are."""


class BadCheckpoint(WeightmillError):
    """A checkpoint's files are damaged, incomplete, inconsistent or hostile."""


class VerifyFailed(WeightmillError):
    """Verification failed: the output is wrong, or the source holds values that the job refuses (NaN, infinities)."""


class StorageError(WeightmillError):
    """Reading or writing failed in a way that a retry does not solve."""


class TransientIOError(StorageError):
    """Reading or writing failed in a way that may be temporary: worth a retry."""


# The errno names that network filesystems and overloaded disks give for a while. They are names, not numbers, since
# EREMOTEIO exists on Linux only.
PASSING = (
    "EIO", "EAGAIN", "EINTR", "ETIMEDOUT", "ESTALE", "ENETDOWN", "ENETUNREACH", "ECONNRESET", "ECONNABORTED",
    "EHOSTUNREACH", "EBUSY", "EREMOTEIO",
)  # fmt: skip
ADVICE = {
    errno.ENOSPC: "free some space, or choose another {output}, and run the same command: it goes on where it was",
    errno.EDQUOT: "free some of your quota, or choose another {output}, and run the same command",
    errno.EACCES: "check who owns it and its permissions",
    errno.EPERM: "check who owns it and its permissions",
    errno.EROFS: "the filesystem is mounted read-only: choose another path",
    errno.ENOENT: "it is not there (any more)",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
}
# Folders are made with those around them, so that this one is of a filesystem such as /proc, or was removed meanwhile.
NO_PLACE = "no folder can be made there: choose another path"


@contextmanager
def io_errors(action: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that says what was being done, where, and what to do.

    Raises:
        TransientIOError: the error's code is one of PASSING.
        StorageError: any other code.
    """
    try:
        yield
    except WeightmillError:  # MissingFile is an OSError, too, and says more
        raise
    except OSError as error:
        kind = TransientIOError if errno.errorcode.get(error.errno or 0) in PASSING else StorageError
        is_no_place = action == "making" and error.errno == errno.ENOENT
        advice = NO_PLACE if is_no_place else ADVICE.get(error.errno or 0, "").format(output=setting("output"))
        raise kind(f"{action} {os.fspath(path)}: {error.strerror or error}{'; ' if advice else ''}{advice}") from error
