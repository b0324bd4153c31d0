"""Trying again what failed in passing: requests to stores, with pauses that grow, within a limit of time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from loaders.errors import StorageError
from loaders.storage.settings import current

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 20.0
T = TypeVar("T")


class Passing(Exception):
    """A request failed in a way that may pass: a server that is busy, a connection that was cut, a name not resolved.

    `pause_s` is the pause that the server asked for (Retry-After), and `is_busy` says that it was asked for too much:
    who sends requests side by side should send fewer.
    """

    def __init__(self, reason: str, *, pause_s: float | None = None, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        self.is_busy = is_busy


def patiently(
    what: str,
    call: Callable[[], T],
    *,
    on_failure: Callable[[Passing], None] = lambda _: None,
    patience_s: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call until it succeeds, while it raises `Passing` and `patience_s` (None: the settings') is not used up.

    Pauses double from FIRST_PAUSE_S on, each drawn from 0 to its length ("full jitter", AWS Architecture Blog,
    "Exponential Backoff And Jitter"), so that many workers do not come back at once; a server's own wish counts more.
    `what` begins the message of the error, and names the object.

    Raises:
        StorageError: it failed until the end; the message has the last reason, and how often it was tried.
    """
    began, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return call()
        except Passing as failure:
            on_failure(failure)
            patience = current().patience_s if patience_s is None else patience_s
            left = patience - (time.monotonic() - began)
            pause = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(tries, 16)))  # noqa: S311
            if failure.pause_s is not None:
                pause = failure.pause_s + random.uniform(0, FIRST_PAUSE_S)  # noqa: S311
            if pause > left:
                raise StorageError(
                    f"{what}: {failure}; tried {tries} times in {time.monotonic() - began:.0f} s: run the same command"
                    " again later, it goes on where it was"
                ) from None
            sleep(pause)
