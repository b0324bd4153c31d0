"""Decoders of AWQ's and GPTQ's integers: (code - zero) * scale, with a zero and a scale for each group and output.

Both store (inputs, outputs), several codes to a 32-bit word. A word of AWQ holds eight outputs of one input, in an
order of its own; words of GPTQ hold inputs of one output, the first lowest. Both are decoded to (outputs, inputs).
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
    """Decode GPTQ words. words: uint32 (n, words), a row for each output; its codes from bit `first` on are the inputs.

    The other arguments are those of `decode_outputs`.
    """
    mask = np.uint32((1 << bits) - 1)
    for r in range(out.shape[0]):
        for j in range(out.shape[1]):
            at = first + j * bits
            shift = at & 31
            code = words[r, at >> 5] >> np.uint32(shift)
            if shift + bits > 32:  # the code goes on in the next word
                code |= words[r, (at >> 5) + 1] << np.uint32(32 - shift)
            out[r, j] = (np.float32(code & mask) - zeros[r, groups[j]]) * scales[r, groups[j]]
