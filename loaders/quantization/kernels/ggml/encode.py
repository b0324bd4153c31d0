"""The encoders of ggml's block types, by type: raw weights (n,) into blocks, uint8."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loaders.quantization.kernels.ggml import blocks, iq4, k_quants, mxfp4, ternary

ENCODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "Q4_0": blocks.encode_q4_0, "Q4_1": blocks.encode_q4_1, "Q5_0": blocks.encode_q5_0,
    "Q5_1": blocks.encode_q5_1, "Q8_0": blocks.encode_q8_0, "MXFP4": mxfp4.encode_mxfp4,
    "Q2_K": k_quants.encode_q2_k, "Q3_K": k_quants.encode_q3_k, "Q4_K": k_quants.encode_q4_k,
    "Q5_K": k_quants.encode_q5_k, "Q6_K": k_quants.encode_q6_k, "TQ1_0": ternary.encode_tq1_0,
    "TQ2_0": ternary.encode_tq2_0, "IQ4_NL": iq4.encode_plain_iq4_nl, "IQ4_XS": iq4.encode_plain_iq4_xs,
}  # fmt: skip
