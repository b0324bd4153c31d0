"""The way of weights to a torch device and of codes back, for each thread that encodes.

A copy to or from a GPU runs beside other work only from page-locked memory and on a stream that is not the default one.
So every thread has page-locked buffers and a stream: while one thread's weights travel, another's are encoded, and a
third one's codes come back. Waiting does not use the CPU. Other devices get plain buffers, and no streams.

While a range is encoded and measured, what travelled stays on the device as well: then it need not travel again to be
compared, and sums of its words tell whether both sides hold the same (`Transfers.keeping`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from loaders.errors import VerifyFailed

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
WORD = 8  # bytes of the integers that are added up
Made = tuple[torch.Tensor, np.ndarray]  # a tensor on the device, and the array of as many bytes that it is to fill


class Transfers:
    """Buffers and streams of all threads between the CPU's memory and a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._local = threading.local()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run torch's operations inside the block on this thread's stream."""
        with torch.inference_mode():
            if not self._is_cuda:
                yield
                return
            if not hasattr(self._local, "stream"):
                self._local.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._local.stream):
                yield

    def _buffer(self, name: str, size: int) -> torch.Tensor:
        """Return `size` bytes of the CPU's memory; a name asked for again gives the same memory again."""
        buffers: dict[str, torch.Tensor] = self._local.__dict__.setdefault("buffers", {})
        found = buffers.get(name)
        if found is None or found.numel() < size:
            found = buffers[name] = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        return found[:size]

    def send(self, x: np.ndarray, dtype: str, slot: int = 0) -> torch.Tensor:
        """Return raw weights (n,) as float32 on the device. Until `fetch`, each call needs a slot of its own."""
        if self._device.type == "mps" and dtype in ("BF16", "F64"):  # which MPS does not hold
            held = self._filled(f"weights {slot}", x)
            return held.view(DTYPES[dtype]).float().to(self._device)
        raw = self.bytes_of(x, f"weights {slot}")
        self._keep(x, raw)
        return raw.view(DTYPES[dtype]).float()

    def bytes_of(self, array: np.ndarray, name: str) -> torch.Tensor:
        """Return an array's bytes on the device, uint8, in memory of their own. Names are as slots of `send`."""
        held = self._filled(name, array)
        return torch.empty_like(held, device=self._device).copy_(held, non_blocking=True)

    def _filled(self, name: str, array: np.ndarray) -> torch.Tensor:
        held = self._buffer(name, array.nbytes)
        np.copyto(held.numpy(), array.reshape(-1).view(np.uint8))
        return held

    def fetch(self, *made: Made) -> None:
        """Copy tensors from the device into arrays of as many bytes, and wait for all that was begun before."""
        held = []
        for number, (tensor, out) in enumerate(made):
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            held.append((self._buffer(f"made {number}", flat.numel()).copy_(flat, non_blocking=True), out))
            self._keep(out, flat)
        if self._is_cuda:
            # A blocking event lets the thread sleep; waiting for the stream itself would keep a core busy.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
            event.synchronize()
        for buffer, out in held:
            np.copyto(out.reshape(-1).view(np.uint8), buffer.numpy())

    # --- what stays on the device

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep on the device what this thread sends and fetches inside the block, until the block ends."""
        self._local.kept = {}
        try:
            yield
        finally:
            self._local.kept = None

    def _keep(self, array: np.ndarray, raw: torch.Tensor) -> None:
        # The array stays too: its memory must not become another's, which would be taken for it.
        if (kept := getattr(self._local, "kept", None)) is not None:
            kept[_place(array)] = array, raw

    def kept(self, array: np.ndarray) -> torch.Tensor | None:
        """Return the device's copy of an array's bytes, uint8, if this thread keeps one."""
        found = (getattr(self._local, "kept", None) or {}).get(_place(array))
        return None if found is None else found[1]


class KeptSums:
    """Sums over the words of arrays and of their copies on the device, which must be the same.

    A copy that was made too early or too late, into memory that was already another's, has other words.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._tensors: list[torch.Tensor] = []

    def add(self, array: np.ndarray, raw: torch.Tensor) -> None:
        self._arrays.append(array)
        self._tensors += _word_sums(raw)

    def made(self) -> Made:
        """Return the device's sums, and the array for them, to be fetched before `check`."""
        self._found = np.empty(len(self._tensors), np.int64)
        return torch.stack(self._tensors), self._found

    def check(self) -> None:
        """Raise VerifyFailed if a sum differs."""
        wanted = [found for array in self._arrays for found in _array_sums(array)]
        if not np.array_equal(wanted, self._found):
            raise VerifyFailed(
                "weights or codes on the GPU are not those in memory: a copy between them went wrong; run the job"
                " again, with backend=cpu if that repeats"
            )


def _place(array: np.ndarray) -> tuple[int, int]:
    return array.__array_interface__["data"][0], array.nbytes


def _word_sums(raw: torch.Tensor) -> list[torch.Tensor]:
    """Return the sum of whole words, modulo 2^64, and that of the bytes after them, if there are any."""
    words = raw.numel() // WORD * WORD
    rest = [raw[words:].sum(dtype=torch.int64)] if words < raw.numel() else []
    return [raw[:words].view(torch.int64).sum(), *rest]


def _array_sums(array: np.ndarray) -> list[np.ndarray]:
    """Return what `_word_sums` does, of an array."""
    raw = array.reshape(-1).view(np.uint8)
    words = raw.size // WORD * WORD
    rest = [raw[words:].sum(dtype=np.int64)] if words < raw.size else []
    return [raw[:words].view(np.int64).sum(), *rest]
