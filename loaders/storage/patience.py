"""Trying again what failed in passing: requests to stores, with pauses that grow, within a limit of time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from loaders.errors import StorageError
from loaders.storage.settings import current
from loaders.storage.traffic import Traffic

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 20.0
# Seconds for a host that never answered this process: its name is more probably wrong, or there is no network, than
# that this passes while one waits.
UNREACHED_S = 15.0
AGAIN = "run the same command again later, it goes on where it was"
T = TypeVar("T")


class Passing(Exception):
    """A request failed in a way that may pass: a server that is busy, a connection that was cut, a name not resolved.

    `pause_s` is the pause that the server asked for (Retry-After), and `is_busy` says that it was asked for too much:
    who sends requests side by side should send fewer. `is_unreached` says that there was no connection to any server.
    """

    def __init__(
        self, reason: str, *, pause_s: float | None = None, is_busy: bool = False, is_unreached: bool = False
    ) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        self.is_busy = is_busy
        self.is_unreached = is_unreached


def patiently(
    what: str,
    call: Callable[[], T],
    to: Traffic,
    *,
    patience_s: float | None = None,
    if_unreached: str = "check the network, and the name of the endpoint",
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call until it succeeds, while it raises `Passing` and `patience_s` (None: the settings') is not used up.

    `to` is the traffic to the host, which learns of failures. If it never answered this process, the patience ends
    after UNREACHED_S, and the error says what to do: `if_unreached`.

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
            result = call()
            to.reached()
            return result
        except Passing as failure:
            if failure.is_busy:
                to.busy()
            if not failure.is_unreached:
                to.reached()
            patience = current().patience_s if patience_s is None else patience_s
            if not to.was_reached:
                patience = min(patience, UNREACHED_S)
            left = patience - (time.monotonic() - began)
            pause = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(tries, 16)))  # noqa: S311
            if failure.pause_s is not None:
                pause = failure.pause_s + random.uniform(0, FIRST_PAUSE_S)  # noqa: S311
            if pause > left:
                raise StorageError(
                    f"{what}: {failure}; tried {tries} times in {time.monotonic() - began:.0f} s:"
                    f" {AGAIN if to.was_reached else if_unreached}"
                ) from None
            sleep(pause)
