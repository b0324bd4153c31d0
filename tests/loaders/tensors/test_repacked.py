"""MXFP4 of checkpoints as ggml's blocks: values stay, and so does every scale, which encoding anew would change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.dtypes import DTYPES
from loaders.quantization.read_only.ggml import decode_blocks
from loaders.quantization.read_only.mxfp4_nvfp4 import GptOssMxfp4
from loaders.quantization.scheme import Block
from loaders.tensors.logical_tensor import LogicalTensor, Window
from loaders.tensors.repacked import holds_mxfp4, repack

pytestmark = pytest.mark.quick

CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
EXPERTS, ROWS, COLUMNS = 2, 6, 96


class Parts:
    """What a checkpoint stores of a stack, and what is written of one of its matrices."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        # A third of the codes are small, so that a block's greatest would often give another scale.
        self.codes = (
            rng.integers(0, 16, (EXPERTS, ROWS, COLUMNS // 2), np.uint8)
            | rng.integers(0, 16, (EXPERTS, ROWS, COLUMNS // 2), np.uint8) << 4
        )
        self.codes[:, ::2] &= 0x33
        self.scales = rng.integers(110, 130, (EXPERTS, ROWS, COLUMNS // 32), np.uint8)
        self.written = np.zeros(0, np.uint8)

    def read(self, role: str, start: int, stop: int) -> Block:
        return {"blocks": self.codes, "scales": self.scales}[role].reshape(-1)[start:stop]

    def write(self, role: str, start: int, data: Block) -> None:
        end = start + data.size
        if end > self.written.size:
            self.written = np.concatenate([self.written, np.zeros(end - self.written.size, np.uint8)])
        self.written[start:end] = data

    def values(self) -> np.ndarray:
        codes = np.stack([self.codes & 15, self.codes >> 4], -1).reshape(EXPERTS, ROWS, COLUMNS)
        scales = np.exp2(self.scales.astype(np.float32) - 127).repeat(32, -1)
        found: np.ndarray = CODES[codes] * scales
        return found


@pytest.fixture
def work() -> Iterator[ThreadedWork]:
    with Crew(1) as crew:
        yield ThreadedWork(kernels_of("cpu"), crew, threading.Event())


def matrix(rows: int, window: Window) -> LogicalTensor:
    return LogicalTensor(
        name="experts.1.gate_proj.weight", dtype=DTYPES["BF16"], shape=(rows, COLUMNS), stored=(), window=window,
        decode=GptOssMxfp4(), whole=(EXPERTS, ROWS, COLUMNS),
    )  # fmt: skip


@pytest.mark.parametrize(("first", "step"), [(0, 1), (0, 2), (1, 2)])
def test_rows_of_a_stack_keep_their_codes_and_scales(first: int, step: int, work: ThreadedWork) -> None:
    parts = Parts()
    tensor = matrix(ROWS // step, Window((ROWS + first) * COLUMNS, (step * COLUMNS, 1)))  # of the second expert
    assert holds_mxfp4(tensor)
    repack(tensor, parts, parts, work)
    blocks = parts.written.reshape(-1, COLUMNS // 32, 17)
    assert np.array_equal(blocks[..., 0], parts.scales[1, first::step])
    out = np.empty(tensor.spec.numel, np.float32)
    decode_blocks("MXFP4", parts.written, out)
    assert np.array_equal(out.reshape(-1, COLUMNS), parts.values()[1, first::step])


def test_columns_of_a_stack_or_other_codes_are_encoded_anew() -> None:
    whole = matrix(ROWS, Window(0, (COLUMNS, 1)))
    assert not holds_mxfp4(replace(whole, shape=(COLUMNS, ROWS), window=Window(0, (1, COLUMNS))))
    assert not holds_mxfp4(replace(whole, window=Window(32, (COLUMNS, 1))))
    assert not holds_mxfp4(replace(whole, decode=None))
