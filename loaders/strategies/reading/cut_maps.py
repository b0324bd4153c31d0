"""What becomes of a process whose mapped file is cut short: the kernel sends SIGBUS at the first byte beyond its end.

Python's handlers cannot catch it: they run between two of Python's operations, and the one that failed never ends. A
job's handler is machine code that finds the file by the address, says its name and ends the process with status 1, as
any other failure does; what is finished is kept. Programs that use the library are left alone: `read` and the other
strategies that do not map files notice a cut file as an error.
"""

from __future__ import annotations

import ctypes
import itertools
import signal
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

MOST = 1 << 12  # maps that are known by name, the last ones
SA_SIGINFO = 4
ADDRESS = 2  # the place of si_addr in siginfo_t of 64-bit Linux, in words of 8 bytes
# By row: the first byte of a map, the byte after its last, the message and its length. What stays 0 is no map.
_known = np.zeros((MOST, 4), np.uint64)
_texts: dict[Path, np.ndarray] = {}
_lock, _rows = threading.Lock(), itertools.cycle(range(MOST))


def name_map(start: int, size: int, path: Path) -> None:
    """Remember that a file lies at `size` bytes from an address on, for `end_by_name`; what lay there has gone."""
    stop = start + size
    with _lock:
        if path not in _texts:
            said = (
                f"\nweightmill: failed: {path}: it was cut short while it was read; run the same command again when"
                " nobody writes to it, or use strategy=read\n"
            )
            _texts[path] = np.frombuffer(said.encode(errors="backslashreplace"), np.uint8)
        _known[(_known[:, 0] < stop) & (_known[:, 1] > start)] = 0
        _known[next(_rows)] = start, stop, _texts[path].ctypes.data, _texts[path].nbytes


class _Action(ctypes.Structure):
    """The struct sigaction of glibc and musl on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@cache
def end_by_name() -> None:
    """From now on a cut map ends this process with a message and status 1, on 64-bit Linux."""
    if not sys.platform.startswith("linux") or sys.maxsize < 1 << 32:
        return
    action = _Action(handler=_engine().get_function_address("handle"), flags=SA_SIGINFO)
    ctypes.CDLL(None, use_errno=True).sigaction(int(signal.SIGBUS), ctypes.byref(action), None)


# For each row of the table: if the address is in it, write(2, text, length) and _exit(1).
CODE = """
declare i64 @write(i32, i64, i64)
declare void @_exit(i32)
define void @handle(i32 %number, POINTER %about, i64 %context) {{
start:
  %field = getelementptr i64, POINTER %about, i64 {address}
  %at = load i64, POINTER %field
  br label %look
look:
  %row = phi i64 [ {table}, %start ], [ %next, %on ]
  %next = add i64 %row, 32
  %first = inttoptr i64 %row to POINTER
  %second = getelementptr i64, POINTER %first, i64 1
  %begin = load i64, POINTER %first
  %end = load i64, POINTER %second
  %after = icmp uge i64 %at, %begin
  %before = icmp ult i64 %at, %end
  %inside = and i1 %after, %before
  br i1 %inside, label %say, label %on
on:
  %more = icmp ult i64 %next, {stop}
  br i1 %more, label %look, label %unknown
say:
  %third = getelementptr i64, POINTER %first, i64 2
  %fourth = getelementptr i64, POINTER %first, i64 3
  %text = load i64, POINTER %third
  %length = load i64, POINTER %fourth
  %written = call i64 @write(i32 2, i64 %text, i64 %length)
  call void @_exit(i32 1)
  unreachable
unknown:
  call void @_exit(i32 {unknown})
  unreachable
}}
"""


@cache
def _engine() -> Any:
    """Compile the handler, by what compiles the kernels: some milliseconds, where numba itself would take a second."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    table = _known.ctypes.data
    code = CODE.format(address=ADDRESS, table=table, stop=table + _known.nbytes, unknown=128 + int(signal.SIGBUS))
    pointer = "ptr" if binding.llvm_version_info[0] > 16 else "i64*"  # the word for it before and since LLVM 17
    module = binding.parse_assembly(code.replace("POINTER", pointer))
    module.triple = binding.get_process_triple()
    machine = binding.Target.from_triple(module.triple).create_target_machine()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine
