"""llama.cpp's log, which llama-cpp-python hides: a test that fails in llama.cpp says what llama.cpp said."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ERROR, CONTINUED = 4, 5  # ggml.h's GGML_LOG_LEVEL_ERROR and GGML_LOG_LEVEL_CONT

Said = list[tuple[int, str]]  # texts with their levels
LISTENING: list[Said] = []


@cache
def _listener() -> Any:
    """Return what llama.cpp calls with its words. It calls it for good, so that it must never be freed."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, data: Any) -> None:
        for said in LISTENING:
            of = said[-1][0] if level == CONTINUED and said else level
            said.append((of, text.decode(errors="replace")))

    return log


@contextmanager
def listening() -> Iterator[Said]:
    """Give a list that llama.cpp's words are added to."""
    import llama_cpp

    said: Said = []
    llama_cpp.llama_log_set(_listener(), ctypes.c_void_p(0))
    LISTENING.append(said)
    try:
        yield said
    finally:
        LISTENING.remove(said)


def errors(said: Said) -> str:
    """Return what llama.cpp said of errors."""
    return "".join(text for level, text in said if level == ERROR)


def load_model(file: Path, **settings: Any) -> Any:
    """Load a GGUF in llama.cpp, where it is installed.

    Raises:
        AssertionError: llama.cpp does not load it; the message has the errors of its log.
    """
    llama_cpp = pytest.importorskip("llama_cpp")
    with listening() as said:
        try:
            return llama_cpp.Llama(str(file), verbose=False, n_threads=1, **settings)
        except ValueError as error:
            raise AssertionError(f"{error}\n{errors(said)}") from None
