"""Being told when numba compiles kernels: once on a machine, and far longer than using them takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event


class _Told(event.Listener):
    def __init__(self, on_compiling: Callable[[], None]) -> None:
        self._on_compiling = on_compiling

    def on_start(self, event: Any) -> None:
        self._on_compiling()

    def on_end(self, event: Any) -> None:
        self._on_compiling()


@contextmanager
def compiling(on_compiling: Callable[[], None]) -> Iterator[None]:
    """Inside, the callback is called when any thread begins to compile, and when it is done; not for cached kernels."""
    told = _Told(on_compiling)
    event.register("numba:compile", told)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        event.unregister("numba:compile", told)  # type: ignore[no-untyped-call]
