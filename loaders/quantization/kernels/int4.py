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
    """AWQ. words: uint32 (inputs, words); outputs: int64 (n,), which codes of them; groups: int64 (inputs,), rows of
    zeros and scales: float32 (groups, n); out: float32 (n, inputs).
    """
    for j in range(words.shape[0]):
        group = groups[j]
        for r in range(outputs.size):
            code = (words[j, outputs[r] >> 3] >> AWQ_SHIFTS[outputs[r] & 7]) & np.uint32(15)
            out[r, j] = (np.float32(code) - zeros[group, r]) * scales[group, r]


@kernel
def decode_inputs(words, bits, inputs, groups, zeros, scales, out):  # type: ignore[no-untyped-def]
    """GPTQ. words: uint32 (words, n); inputs: int64 (inputs,), which codes down the words; the rest as above."""
    mask, each = np.uint32((1 << bits) - 1), 32 // bits
    for j in range(inputs.size):
        group, word, shift = groups[j], inputs[j] // each, np.uint32(inputs[j] % each * bits)
        for r in range(out.shape[0]):
            code = (words[word, r] >> shift) & mask
            out[r, j] = (np.float32(code) - zeros[group, r]) * scales[group, r]
