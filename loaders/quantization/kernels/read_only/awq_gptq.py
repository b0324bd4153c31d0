"""Decoders of AWQ's and GPTQ's integers: (code - zero) * scale, with a zero and a scale for each group and output.

Both store (inputs, outputs), several codes to a 32-bit word. A word of AWQ holds eight outputs of one input, in an
order of its own; a word of GPTQ holds inputs of one output, the first lowest. Both are decoded to (outputs, inputs).
The product of such a small integer and a float16 scale is exact in float32.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.lanes import kernel

AWQ_SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)  # where a word holds its outputs 0 to 7


@kernel
def decode_outputs(words, outputs, groups, zeros, scales, out):  # type: ignore[no-untyped-def]
    """Decode some outputs of AWQ words, one output after another, whose weights then lie together in `out`.

    words: uint32 (words, inputs); outputs: int64 (n,), indexes of codes, eight to a word; groups: int64 (inputs,), each
    input's column of zeros and scales; zeros, scales: float32 (n, groups); out: float32 (n, inputs).
    """
    for r in range(outputs.size):
        column, shift = outputs[r] >> 3, AWQ_SHIFTS[outputs[r] & 7]
        for j in range(words.shape[1]):
            code = (words[column, j] >> shift) & np.uint32(15)
            out[r, j] = (np.float32(code) - zeros[r, groups[j]]) * scales[r, groups[j]]


@kernel
def decode_inputs(words, bits, first, groups, zeros, scales, out):  # type: ignore[no-untyped-def]
    """Decode GPTQ words. words: uint32 (n, words), a row for each output; its codes from `first` on are the inputs.

    The other arguments are those of `decode_outputs`.
    """
    mask, each = np.uint32((1 << bits) - 1), 32 // bits
    for r in range(out.shape[0]):
        j = 0
        for w in range(words.shape[1]):
            word = words[r, w]
            for i in range(first if w == 0 else 0, min(each, out.shape[1] - j + (first if w == 0 else 0))):
                code = (word >> np.uint32(i * bits)) & mask
                out[r, j] = (np.float32(code) - zeros[r, groups[j]]) * scales[r, groups[j]]
                j += 1
