"""An answer to a signal to stop, while code runs that does not listen to any, such as an engine's compiler.

Python hears of a signal between two of its own instructions, and such code can take minutes for one. A thread hears of
it at once: it says so, and ends a process that does not begin to stop. What a job has written stands that, as it stands
`kill -9`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jobs.cli.early import INTERRUPTED

SAY_S = 2.0  # seconds after which a person wonders whether a signal was heard
DEAF_S = 30.0  # seconds that code which does not listen gets to come back
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def answering() -> Iterator[None]:
    """Have the signals that raise KeyboardInterrupt answered inside the block. It is for the main thread."""
    heard, ended = threading.Event(), threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        heard.set()
        signal.default_int_handler(number, frame)

    numbers = [number for number in NUMBERS if signal.getsignal(number) is signal.default_int_handler]
    told, telling = os.pipe()
    os.set_blocking(telling, False)
    before = signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, stop)
    listener = threading.Thread(target=_listen, args=(told, set(numbers), heard, ended), name="stopping", daemon=True)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        for number in numbers:
            # Ray puts handlers of its own in place, and whoever runs us may.
            if signal.getsignal(number) is stop:
                signal.signal(number, signal.default_int_handler)
        os.close(telling)  # which ends the thread's reading
        listener.join()
        os.close(told)


def _listen(told: int, numbers: set[int], heard: threading.Event, ended: threading.Event) -> None:
    while numbers.isdisjoint(found := os.read(told, 64)):
        if not found:
            return
    if ended.wait(SAY_S):
        return
    os.write(2, b"weightmill: stopping; what is finished is kept\n")
    if not heard.wait(DEAF_S) and not ended.is_set():
        os.write(2, b"weightmill: stopped: interrupted in code that does not listen; the same command goes on\n")
        os._exit(INTERRUPTED)
