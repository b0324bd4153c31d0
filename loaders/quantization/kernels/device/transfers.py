"""The way of weights to a torch device and of codes back, for each thread that encodes.

A copy to or from a GPU runs beside other work only from page-locked memory and on a stream that is not the default one.
So every thread has page-locked buffers and a stream: while one thread's weights travel, another's are encoded, and a
third one's codes come back. Waiting does not use the CPU. Other devices get plain buffers, and no streams.

To start each of an encoder's dozens of kernels from Python takes longer than all of them on the GPU, and threads that
do so wait for one another. What a thread has run for several ranges of one length is therefore recorded as a CUDA graph
(`device/graphs.py`), copies included, and for further ranges started by a single call.

While a range is encoded and measured, what travelled stays on the device as well: then it need not travel again to be
compared, and sums of its words tell whether both sides hold the same (`Transfers.keeping`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from loaders.errors import VerifyFailed
from loaders.quantization.kernels.device.graphs import Graphs

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
WORD = 8  # bytes of the integers that are added up
LEAST_BUFFER = 1 << 16  # bytes of page-locked memory; buffers grow by doubling
# From the bytes of arrays on the device, uint8 tensors, to the tensors that fill the outputs.
Compute = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class Transfers:
    """Buffers, streams and graphs of all threads between the CPU's memory and a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local = _Own(device)

    def run(
        self, key: Hashable, sent: Sequence[np.ndarray], compute: Compute, outs: Sequence[np.ndarray]
    ) -> None:  # fmt: skip
        """Send arrays to the device, compute there, and fill `outs`, contiguous arrays of as many bytes as is computed.

        Equal keys, with arrays of the same sizes, stand for the same operations on the device, of which none may
        depend on values in the CPU's memory but for those that are sent. None stands for what is done only once.
        """
        own = self._local
        with torch.inference_mode(), own.on_stream():
            into = [own.buffer(f"sent {index}", array.nbytes) for index, array in enumerate(sent)]
            back = [own.buffer(f"made {index}", out.nbytes) for index, out in enumerate(outs)]
            for buffer, array in zip(into, sent, strict=True):
                np.copyto(buffer.numpy(), array.reshape(-1).view(np.uint8))

            def queue() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
                raws = [torch.empty_like(held, device=self._device).copy_(held, non_blocking=True) for held in into]
                made = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in compute(raws)]
                for held, tensor in zip(back, made, strict=True):
                    held.copy_(tensor, non_blocking=True)
                return raws, made

            sizes = tuple(held.numel() for held in (*into, *back))
            raws, made = queue() if key is None else own.graphs.run((key, len(into), sizes), queue, (*into, *back))
            own.wait()
            for held, out in zip(back, outs, strict=True):
                np.copyto(out.reshape(-1).view(np.uint8), held.numpy())
        if own.kept is not None:
            own.keep((*zip(sent, raws, strict=True), *zip(outs, made, strict=True)))

    # --- what stays on the device

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep on the device what this thread sends and fetches inside the block, until the block ends."""
        self._local.kept = {}
        try:
            yield
        finally:
            self._local.kept = None

    def kept(self, array: np.ndarray) -> torch.Tensor | None:
        """Return the device's copy of an array's bytes, uint8, if this thread keeps one."""
        found = (self._local.kept or {}).get(_place(array))
        return None if found is None else found[1]


class _Own(threading.local):
    """A thread's own stream, buffers and graphs, and what it keeps on the device."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._buffers: dict[str, torch.Tensor] = {}
        self.kept: dict[tuple[int, int], tuple[np.ndarray, torch.Tensor]] | None = None
        self._stream: Any = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        # A blocking event lets the thread sleep; waiting for the stream itself would keep a core busy.
        self._event: Any = torch.cuda.Event(blocking=True) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self.graphs = Graphs(self._stream)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run torch's operations inside the block on this thread's stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def buffer(self, name: str, size: int) -> torch.Tensor:
        """Return `size` bytes of the CPU's memory; a name asked for again gives the same memory again."""
        found = self._buffers.get(name)
        if found is None or found.numel() < size:
            whole = max(LEAST_BUFFER, 1 << (size - 1).bit_length())
            found = self._buffers[name] = torch.empty(whole, dtype=torch.uint8, pin_memory=self._is_cuda)
        return found[:size]

    def keep(self, pairs: Sequence[tuple[np.ndarray, torch.Tensor]]) -> None:
        """Keep arrays with their copies on the device."""
        # A graph that runs again writes over what it has given before.
        others = (item for item in (self.kept or {}).items() if all(item[1][1] is not raw for _, raw in pairs))
        # The arrays stay, too: their memory must not become another's, which would be taken for them.
        self.kept = {**dict(others), **{_place(array): (array, raw) for array, raw in pairs}}

    def wait(self) -> None:
        """Wait for all that this thread has begun on the device."""
        if self._event is not None:
            self._event.record(self._stream)
            self._event.synchronize()


def word_sums(raw: torch.Tensor) -> list[torch.Tensor]:
    """Return the sum of whole words, modulo 2^64, and that of the bytes after them, if there are any: int64 each."""
    words = raw.numel() // WORD * WORD
    rest = [raw[words:].sum(dtype=torch.int64)] if words < raw.numel() else []
    return [raw[:words].view(torch.int64).sum(), *rest]


def array_sums(array: np.ndarray) -> list[np.ndarray]:
    """Return what `word_sums` does, of an array."""
    raw = array.reshape(-1).view(np.uint8)
    words = raw.size // WORD * WORD
    rest = [raw[words:].sum(dtype=np.int64)] if words < raw.size else []
    return [raw[:words].view(np.int64).sum(), *rest]


def check_sums(arrays: Sequence[np.ndarray], found: np.ndarray) -> None:
    """Check the device's `word_sums` of its copies of arrays.

    A copy that was made too early or too late, into memory that was already another's, has other words.

    Raises:
        VerifyFailed: a sum differs.
    """
    if not np.array_equal([each for array in arrays for each in array_sums(array)], found):
        raise VerifyFailed(
            "weights or codes on the GPU are not those in memory: a copy between them went wrong; run the job"
            " again, with backend=cpu if that repeats"
        )


def count_of_sums(array: np.ndarray) -> int:
    """Return how many sums `word_sums` gives of an array."""
    return 1 + (array.nbytes % WORD > 0)


def _place(array: np.ndarray) -> tuple[int, int]:
    return array.__array_interface__["data"][0], array.nbytes
