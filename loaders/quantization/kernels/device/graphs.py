"""CUDA graphs of what a thread does again and again: recorded once, copies included, and started by a single call.

A graph reads and writes the memory that was there when it was recorded: the page-locked buffers are filled anew for
every run, and the tensors on the device are the graph's own, valid until the same thread runs it again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger("weightmill")
RUNS_BEFORE = 2  # runs without a graph, in which kernels are compiled and tables come to the device
MOST = 16  # graphs that a thread keeps: an encoder and a comparison for each of some schemes and lengths of ranges
# Recordings follow one another: they share the state of torch's random numbers.
_RECORDING = threading.Lock()
Tensors = tuple[list[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class _Recorded:
    graph: Any  # torch.cuda.CUDAGraph
    tensors: Tensors
    buffers: tuple[torch.Tensor, ...]  # page-locked memory that it copies from and to, held as long as the graph is


class Graphs:
    """The graphs of one thread and its stream. Without a stream nothing is recorded."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._runs: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None

    def run(self, key: Hashable, queue: Callable[[], Tensors], buffers: tuple[torch.Tensor, ...]) -> Tensors:
        """Do on the stream what `queue` does, by its graph once there is one; return its tensors on the device."""
        if self._stream is None:
            return queue()
        # Buffers that have grown since are others.
        key = key, tuple(buffer.data_ptr() for buffer in buffers)
        if (found := self._recorded.pop(key, None)) is not None:
            self._recorded[key] = found  # the last one used is the last to be dropped
            found.graph.replay()
            return found.tensors
        runs = self._runs.get(key, 0)
        if runs < RUNS_BEFORE or _Failed.reason is not None:
            self._runs[key] = runs + 1
            return queue()
        return self._record(key, queue, buffers)

    def _record(self, key: Hashable, queue: Callable[[], Tensors], buffers: tuple[torch.Tensor, ...]) -> Tensors:
        del self._runs[key]
        if len(self._recorded) >= MOST:
            self._recorded.pop(next(iter(self._recorded)))
        graph: Any = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # graphs of a thread never run at once
        try:
            with _RECORDING:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    tensors = queue()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            # What cannot be recorded runs as before, only slower.
            _Failed.reason = str(error)
            log.warning("CUDA graphs are not used: %s", " ".join(str(error).split())[:200])
            return queue()
        self._recorded[key] = _Recorded(graph, tensors, buffers)
        graph.replay()
        return tensors


class _Failed:
    """Why recording failed once in this process, after which nothing is recorded any more."""

    reason: str | None = None
