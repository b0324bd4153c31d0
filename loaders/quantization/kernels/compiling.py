"""A hook into numba's compiler, so that progress can say why a first run on a machine waits.

Compiling happens once, since kernels are cached on the disk; it takes far longer than a small job's own work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event


class _Told(event.Listener):
    """A listener that reports both ends of a compilation by the same call."""

    def __init__(self, on_compiling: Callable[[], None]) -> None:
        self._on_compiling = on_compiling

    def on_start(self, event: Any) -> None:
        self._on_compiling()

    def on_end(self, event: Any) -> None:
        self._on_compiling()


@contextmanager
def compiling(on_compiling: Callable[[], None]) -> Iterator[None]:
    """Call `on_compiling` inside the context whenever a thread begins to compile a kernel, and again when it is done.

    Kernels that come from numba's disk cache are not compiled and cause no call.
    """
    told = _Told(on_compiling)
    event.register("numba:compile", told)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        event.unregister("numba:compile", told)  # type: ignore[no-untyped-call]
