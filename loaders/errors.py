"""What can go wrong, as few kinds as a caller would treat differently.

Every message says what, where, what was expected, what was found and what to do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

_NAMES: dict[str, str] = {}


def setting(name: str) -> str:
    """What a setting is called in a message: by the library's name, or as the program says that runs it."""
    return _NAMES.get(name, name)


@contextmanager
def settings_called(names: Mapping[str, str]) -> Iterator[None]:
    """Within the block, messages of this process call the library's settings by these names.

    A program whose users know settings by other names, such as keys of a config file, says so here.
    """
    before = dict(_NAMES)
    _NAMES.update(names)
    try:
        yield
    finally:
        _NAMES.clear()
        _NAMES.update(before)


class WeightmillError(Exception):
    """The base of all errors that are not bugs of weightmill."""


class BadSpec(WeightmillError):
    """The request is wrong: nothing was started. `problems` holds every fault found."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[BadSpec], tuple[tuple[str, ...]]]:
        return BadSpec, (self.problems,)


class BadCheckpoint(WeightmillError):
    """A checkpoint's files are damaged, incomplete, inconsistent or hostile."""


class VerifyFailed(WeightmillError):
    """What was written is not right, or the source holds what may not pass."""


class StorageError(WeightmillError):
    """Reading or writing failed in a way that trying again does not mend."""


class TransientIOError(StorageError):
    """Reading or writing failed in a way that may pass: worth another attempt."""


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


@contextmanager
def io_errors(action: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError inside into a StorageError that says what was being done, where, and what to do."""
    try:
        yield
    except OSError as error:
        kind = TransientIOError if errno.errorcode.get(error.errno or 0) in PASSING else StorageError
        advice = ADVICE.get(error.errno or 0, "").format(output=setting("output"))
        raise kind(f"{action} {os.fspath(path)}: {error.strerror or error}{'; ' if advice else ''}{advice}") from error
