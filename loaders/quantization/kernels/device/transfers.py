"""The way of weights to a torch device and of codes back, for each thread that encodes.

A copy to or from a GPU runs beside other work only from page-locked memory and on a stream that is not the default one.
So every thread has page-locked buffers and a stream: while one thread's weights travel, another's are encoded, and a
third one's codes come back. Waiting does not use the CPU. Other devices get plain buffers, and no streams.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


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
        held = self._buffer(f"weights {slot}", x.nbytes)
        np.copyto(held.numpy(), x.view(np.uint8))
        raw = held.view(DTYPES[dtype])
        if self._device.type == "mps" and dtype in ("BF16", "F64"):  # which MPS does not hold
            raw = raw.float()
        return raw.to(self._device, non_blocking=True).float()

    def fetch(self, *made: tuple[torch.Tensor, np.ndarray]) -> None:
        """Copy tensors from the device into arrays of as many bytes, and wait for all that was begun before."""
        held = []
        for number, (tensor, out) in enumerate(made):
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            held.append((self._buffer(f"made {number}", flat.numel()).copy_(flat, non_blocking=True), out))
        if self._is_cuda:
            # A blocking event lets the thread sleep; waiting for the stream itself would keep a core busy.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
            event.synchronize()
        for buffer, out in held:
            np.copyto(out.view(np.uint8), buffer.numpy())
