"""Watching a program's calls, to see through which files of `jobs/` and `loaders/` something walks: see tests/walks.py.

`sys.setprofile` tells of every call and return, on all threads. What is looked for is a predicate over a name and a
value. A function has it in hand as an argument, a local or captured variable, its result, or the result of a function
that it called; what it has only deep inside something, it carries.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
from pydantic import BaseModel

from loaders.places import ROOT

OURS = (f"{ROOT / 'jobs'}{os.sep}", f"{ROOT / 'loaders'}{os.sep}")
ATOMS = (int, float, str, bytes, bytearray, memoryview, np.ndarray, type(None), type)
IsIt = Callable[[str, Any], bool]  # whether a value, under its name, is what is followed
Files = dict[str, dict[str, None]]  # functions by file, both in the order in which they were called


@dataclass
class Walk:
    """What was seen of one thing: the files that count, and others."""

    counted: Files = field(default_factory=dict)
    before: Files = field(default_factory=dict)  # where it comes from
    carried: Files = field(default_factory=dict)
    compiled: Files = field(default_factory=dict)  # kernels


# --- what a value holds


def parts(value: Any) -> tuple[bool, Iterator[tuple[str, Any]]]:
    """Whether a value is an object rather than a plain collection, and its attributes or items, by name."""
    if isinstance(value, dict):
        return False, ((str(key), each) for key, each in list(value.items()))
    if isinstance(value, list | tuple | set | frozenset):
        return False, (("", each) for each in list(value))
    if is_dataclass(value) and not isinstance(value, type):
        return True, ((each.name, getattr(value, each.name, None)) for each in fields(value))
    if isinstance(value, BaseModel) or type(value).__module__.partition(".")[0] in ("jobs", "loaders"):
        return True, iter(list(getattr(value, "__dict__", {}).items()))
    return True, iter(())


def in_hand(is_it: IsIt, name: str, value: Any, attributes: int, depth: int = 8) -> bool:
    """Whether it is the value, in plain collections of it, or one attribute away."""
    if is_it(name, value):
        return True
    if isinstance(value, ATOMS) or depth == 0:
        return False
    is_object, inside = parts(value)
    left = attributes - is_object
    return left >= 0 and any(in_hand(is_it, *each, left, depth - 1) for each in inside)


def holders(is_it: IsIt, value: Any) -> frozenset[int]:
    """The objects and collections that have it as an attribute or item, however deep inside a value."""
    found, seen, todo = set[int](), set[int](), [value]
    while todo:
        holder = todo.pop()
        if isinstance(holder, ATOMS) or id(holder) in seen:
            continue
        seen.add(id(holder))
        for name, each in parts(holder)[1]:
            if is_it(name, each):
                found.add(id(holder))
            todo.append(each)
    return frozenset(found)


# --- what is called


@dataclass
class Look:
    """What was seen of a call."""

    has: bool  # it had what is followed in hand
    carries: bool = False  # or inside something
    gives: bool = False  # gave it back
    stores: bool = False  # put it into an argument


@dataclass(eq=False)
class Call:
    """A function's call, under way or ended."""

    file: str
    function: str
    caller: Call | None
    frame: FrameType | None  # while it is under way
    arguments: list[Any]  # likewise
    held: list[frozenset[int]]  # what its arguments held when it began
    reaches: bool = False  # the end was reached inside it
    looks: list[Look] = field(default_factory=list)

    @property
    def has(self) -> bool:
        return any(look.has for look in self.looks)

    def is_inside(self, function: str) -> bool:
        return self.function == function or (self.caller is not None and self.caller.is_inside(function))

    @property
    def is_on_the_walk(self) -> bool:
        if self.reaches or any(look.stores for look in self.looks):
            return True
        return any(look.gives for look in self.looks) and (self.caller is None or self.caller.is_on_the_walk)


class Watch:
    """Watches all calls while it is entered.

    `ends` says of a frame, as it is called, that an end is reached; what is seen counts once an end comes after it.
    Without `slices`, all calls are on the walk, and nobody looks for what is carried.
    """

    def __init__(self, is_it: IsIt, ends: Callable[[FrameType], bool], *, first_end: bool, slices: bool) -> None:
        self._is_it = is_it
        self._ends = ends
        self._first_end = first_end  # alone, rather than the last
        self._slices = slices
        self._attributes = int(slices)  # that may lie between: a reader's map is not yet a tensor's bytes
        self._calls: list[Call] = []
        self._seen: list[tuple[Call, Look]] = []  # since the last end
        self._is_over = False
        self._local = threading.local()
        self._files: dict[str, str] = {}

    def __enter__(self) -> Watch:
        self._before = sys.getprofile(), threading.getprofile()
        self._patch = patch.object(ThreadPoolExecutor, "submit", self._submitting(ThreadPoolExecutor.submit))
        self._patch.start()
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        return self

    def __exit__(self, *of_an_error: object) -> None:
        sys.setprofile(self._before[0])
        threading.setprofile(self._before[1])
        self._patch.stop()

    def _submitting(self, submit: Callable[..., Future[Any]]) -> Callable[..., Future[Any]]:
        """`submit`, which makes the call that hands work over the caller of that work."""

        def submitted(pool: ThreadPoolExecutor, work: Callable[..., Any], *given: Any, **named: Any) -> Future[Any]:
            caller = self._current

            def run(*given: Any, **named: Any) -> Any:
                self._local.origin = caller
                return work(*given, **named)

            return submit(pool, run, *given, **named)

        return submitted

    @property
    def _stack(self) -> list[Call]:
        """This thread's calls."""
        stack: list[Call] = self._local.__dict__.setdefault("stack", [])
        return stack

    @property
    def _current(self) -> Call | None:
        return self._stack[-1] if self._stack else getattr(self._local, "origin", None)

    def _event(self, frame: FrameType, event: str, result: Any) -> None:
        if event == "call" and not self._is_over:
            if self._file(frame):
                self._begin(frame)
            if self._ends(frame):
                self._reached()
        elif event == "return" and self._stack and self._stack[-1].frame is frame:
            call = self._stack.pop()
            if not self._is_over:
                self._return(call, result)
            call.frame, call.arguments = None, []

    def _file(self, frame: FrameType) -> str:
        """A file of ours, else nothing."""
        path = frame.f_code.co_filename
        if path not in self._files:
            self._files[path] = str(Path(path).relative_to(ROOT)) if path.startswith(OURS) else ""
        return self._files[path]

    def _begin(self, frame: FrameType) -> None:
        arguments = list(frame.f_locals.values())
        held = [holders(self._is_it, each) for each in arguments] if self._slices else []
        function = frame.f_code.co_qualname.replace(".<locals>", "")
        self._calls.append(Call(self._file(frame), function, self._current, frame, arguments, held))
        self._stack.append(self._calls[-1])

    def _return(self, call: Call, result: Any) -> None:
        is_given = in_hand(self._is_it, "", result, self._attributes)
        self._seen.append((call, self._look(call, result)))
        if is_given and call.caller is not None:
            self._seen.append((call.caller, Look(has=True)))

    def _look(self, call: Call, result: Any = None) -> Look:
        assert call.frame is not None
        values = [*call.frame.f_locals.items(), ("", result)]
        has = any(in_hand(self._is_it, *each, self._attributes) for each in values)
        if not self._slices:
            return Look(has)
        now = [holders(self._is_it, each) for each in call.arguments]
        return Look(
            has,
            carries=any(holders(self._is_it, each) for _, each in values),
            gives=self._is_it("", result) or bool(holders(self._is_it, result)),
            stores=any(after - before for before, after in zip(call.held, now, strict=True)),
        )

    def _reached(self) -> None:
        seen, self._seen = self._seen, []
        for call, look in seen:
            call.looks.append(look)
        current = self._current
        while current is not None:
            current.reaches = True
            if current.frame is not None:
                current.looks.append(self._look(current))
            current = current.caller
        self._is_over = self._first_end

    def walk(self, after: str = "") -> Walk:
        """What was seen; apart, what was seen inside the function after which the walk begins."""
        found = Walk()
        for call in self._calls:
            if (call.is_on_the_walk or not self._slices) and any(look.has or look.carries for look in call.looks):
                files = found.carried if not call.has else found.before if call.is_inside(after) else found.counted
                files.setdefault(call.file, {})[call.function] = None
        for files, others in ((found.before, [found.counted]), (found.carried, [found.counted, found.before])):
            for file in [file for file in files if any(file in other for other in others)]:
                del files[file]
        return found
