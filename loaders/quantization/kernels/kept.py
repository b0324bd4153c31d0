"""Where compiled kernels are kept: in NUMBA_CACHE_DIR, beside their files, in a folder of this user's, or nowhere.

numba refuses to load a kernel that it may keep nowhere, fails when its folder fills up, and trusts what it finds. Here
a kernel that cannot be kept is compiled all the same, and one that is damaged is compiled anew.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    InTreeCacheLocator,
    UserProvidedCacheLocator,
    UserWideCacheLocator,
)

from loaders.storage.user_cache import default_folder

NAMED = "NUMBA_CACHE_DIR"
NOWHERE = f"not kept, since no folder for them can be written ({NAMED} names one)"
UNPACKED = "_ray_pkg_"  # begins the name of the folder into which Ray unpacks code, anew in each of its sessions
# What reading an entry raises that was cut or changed, or was written by another version of what it is made of.
DAMAGED = (
    OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError,
    MemoryError, RuntimeError, RecursionError, AssertionError,
)  # fmt: skip
_elsewhere: set[str] = set()  # how kernels of this process are kept, other than beside their files


def kept_how() -> str:
    """Say where the kernels that this process compiles are kept, as the end of a sentence about them."""
    return NOWHERE if NOWHERE in _elsewhere else min(_elsewhere, default="kept")


@cache
def _own_folder() -> Path:
    return default_folder() / "kernels"


class _OwnLocator(UserWideCacheLocator):
    """The folder of weightmill's caches. numba's own would be a folder called ~ where no home is known."""

    def __init__(self, py_func: Callable[..., Any], py_file: str) -> None:
        super().__init__(py_func, py_file)  # type: ignore[no-untyped-call]
        name = self.get_suitable_cache_subpath(py_file)  # type: ignore[no-untyped-call]
        self._cache_path = os.fspath(_own_folder() / name)


class _UnpackedLocator(UserWideCacheLocator):
    """For code that was sent to a cluster: kernels that are kept beside it go with the cluster.

    They lie in the named folder, or that of weightmill's caches, under their file's path within what was sent.
    """

    def __init__(self, py_func: Callable[..., Any], py_file: str) -> None:
        super().__init__(py_func, py_file)  # type: ignore[no-untyped-call]
        inner = Path(*Path(py_file).parts[_unpacked_at(py_file) :])
        base = Path(os.environ[NAMED]) if os.environ.get(NAMED) else _own_folder()
        self._cache_path = os.fspath(base / "sent" / inner.parent)

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _UnpackedLocator | None:
        return super().from_function(py_func, py_file) if _unpacked_at(py_file) else None  # type: ignore[no-untyped-call]


def _unpacked_at(py_file: str) -> int:
    """Return where in a file's path begins what Ray has unpacked; 0 if it has not."""
    parts = Path(py_file).parts
    return next((index + 1 for index, part in enumerate(parts) if part.startswith(UNPACKED)), 0)


class _Places(CompileResultCacheImpl):
    _locator_classes = [_UnpackedLocator, UserProvidedCacheLocator, InTreeCacheLocator, _OwnLocator]  # noqa: RUF012  # as numba has it


class _KernelCache(FunctionCache):
    _impl_class = _Places

    def __init__(self, py_func: Callable[..., Any], shared: Iterable[str]) -> None:
        super().__init__(py_func)  # type: ignore[no-untyped-call]
        if isinstance(self._impl.locator, _OwnLocator):
            _elsewhere.add(f"kept in {_own_folder()}")
        # numba watches the function's own file, and code of other files is compiled into it.
        self._cache_file._source_stamp = (self._cache_file._source_stamp, *shared)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except DAMAGED:
            self._drop_index()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except DAMAGED:
            _elsewhere.add(NOWHERE)

    def _drop_index(self) -> None:
        """Begin a new index, without what could not be read."""
        try:
            self.flush()  # type: ignore[no-untyped-call]
        except OSError:
            _elsewhere.add(NOWHERE)


def keep(dispatcher: Any, shared: Iterable[str]) -> None:
    """Have a compiled function of numba's kept on the disk, under a stamp of its own file and of `shared`."""
    try:
        dispatcher._cache = _KernelCache(dispatcher.py_func, shared)
    # numba found no folder that it may write.
    except RuntimeError:
        _elsewhere.add(NOWHERE)
