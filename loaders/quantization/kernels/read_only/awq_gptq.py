"""Decoding AWQ's and GPTQ's integers: (code - zero) * scale, a zero and a scale for each group of inputs and output.

Both store (inputs, outputs), several codes to a 32-bit word: AWQ eight outputs, in an order of its own; GPTQ inputs,
the first lowest. What is decoded is (outputs, inputs). The product of a small integer and a float16 is exact.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.lanes import kernel

AWQ_SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)  # of outputs 0 to 7 of a word


@kernel
def decode_outputs(words, outputs, groups, zeros, scales, out):  # type: ignore[no-untyped-def]
    """AWQ. words: uint32 (words, inputs); outputs: int64 (n,), which codes of them; groups: int64 (inputs,), columns of
    zeros and scales: float32 (n, groups); out: float32 (n, inputs). An output at a time: its weights lie together.
    """
    for r in range(outputs.size):
        column, shift = outputs[r] >> 3, AWQ_SHIFTS[outputs[r] & 7]
        for j in range(words.shape[1]):
            code = (words[column, j] >> shift) & np.uint32(15)
            out[r, j] = (np.float32(code) - zeros[r, groups[j]]) * scales[r, groups[j]]


@kernel
def decode_inputs(words, bits, first, groups, zeros, scales, out):  # type: ignore[no-untyped-def]
    """GPTQ. words: uint32 (n, words), whose codes from `first` on are the inputs; the rest as above."""
    mask, each = np.uint32((1 << bits) - 1), 32 // bits
    for r in range(out.shape[0]):
        j = 0
        for w in range(words.shape[1]):
            word = words[r, w]
            for i in range(first if w == 0 else 0, min(each, out.shape[1] - j + (first if w == 0 else 0))):
                code = (word >> np.uint32(i * bits)) & mask
                out[r, j] = (np.float32(code) - zeros[r, groups[j]]) * scales[r, groups[j]]
                j += 1
