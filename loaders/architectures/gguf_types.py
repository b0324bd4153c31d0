"""Types in a GGUF that nobody chooses: tensors that are float32 whatever is asked, and those that are never quantized.

The first are prepare_tensors's in llama.cpp's conversion/base.py, the second tensor_allows_quantization's in
src/llama-quant.cpp. Both go by the tensor's name in the GGUF.
"""

from __future__ import annotations

import re

from loaders.dtypes import Shape

FLOAT32 = re.compile(
    r"^(?:blk\.\d+\.(?:ffn_gate_inp|ffn_gate_inp_shexp|ssm_conv1d(?:_[qkv])?|shortconv\.conv|indexer\.proj"
    r"|altup_(?:correct|predict)_coef|time_mix_(?:first|w[12]|decay_w[12]|lerp_fused))"
    r"|posnet\.\d+\.norm[12]|position_embd|token_types)\.weight$"
)
UNQUANTIZED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|^(?:position_embd|token_types)\.weight$|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(?:first|[wvag][012]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight|\.position_embd|\.rel_pos"
    r"|sam\.(?:pos_embd|neck\.|net_)|\.patch_(?:embd|merger)|a\.rvq\.codebook|mm\.a\.code_embd"
)
# of one architecture alone
UNQUANTIZED_OF = {
    "glm5-next": re.compile(
        r"hc_|indexer\.(?:attn_q_b|attn_k|proj)|indexer_compressor_(?:gate|ape)|ssm_(?:f_[ab]|g_[ab]|beta)\.weight"
        r"|attn_kv_a_mqa\.weight|attn_[kv]_b\.weight"
    )
}


def is_float32(name: str, dimensions: int) -> bool:
    """Whether a tensor is float32 whatever is asked for the others."""
    return (
        dimensions < 2
        or name.endswith("_norm.weight")
        or not name.endswith(".weight")
        or FLOAT32.match(name) is not None
    )


def is_quantized(architecture: str, name: str, shape: Shape) -> bool:
    """Whether llama.cpp quantizes a tensor at all. `shape` is that of the whole tensor, of a stack with its experts."""
    own = UNQUANTIZED_OF.get(architecture)
    # ggml counts dimensions up to the last that is not one, and lists columns first.
    dimensions = len(shape) - next((index for index, size in enumerate(shape) if size > 1), len(shape))
    return (
        dimensions >= 2
        and name.endswith("weight")
        and UNQUANTIZED.search(name) is None
        and (own is None or own.search(name) is None)
    )
