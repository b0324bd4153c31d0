"""The checkpoint of the cluster's tests: thirty units that take a core half a second each, by quant=gguf_q4_k_m."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.making import LLAMA, Raw, tokenizer, weights, write_checkpoint

WIDE, DEEP, BETWEEN, KEYS, TOKENS = 1024, 40, 2048, 512, 2048
CONFIG = {
    **LLAMA, "hidden_size": WIDE, "intermediate_size": BETWEEN, "num_hidden_layers": DEEP, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": TOKENS, "dtype": "bfloat16",
}  # fmt: skip
SETTINGS = ("quant=gguf_q4_k_m", "unit_mb=32")
POOL = weights(np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32) * 0.05, "BF16").data


def write_model(folder: Path, *, layers: int = DEEP, seed: int = 0) -> Path:
    """Write a Llama whose weights are all cut out of one pool of random numbers, which makes it quick to write."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Raw:
        start = int(rng.integers(0, POOL.size - rows * columns))
        return Raw("BF16", POOL[start : start + rows * columns].reshape(rows, columns))

    ones = weights(np.ones(WIDE, np.float32), "BF16")
    tensors = {"model.embed_tokens.weight": matrix(TOKENS, WIDE), "lm_head.weight": matrix(TOKENS, WIDE)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        for part, rows, columns in (
            ("self_attn.q_proj", WIDE, WIDE), ("self_attn.k_proj", KEYS, WIDE), ("self_attn.v_proj", KEYS, WIDE),
            ("self_attn.o_proj", WIDE, WIDE), ("mlp.gate_proj", BETWEEN, WIDE), ("mlp.up_proj", BETWEEN, WIDE),
            ("mlp.down_proj", WIDE, BETWEEN),
        ):  # fmt: skip
            tensors[f"{name}{part}.weight"] = matrix(rows, columns)
        tensors |= {f"{name}input_layernorm.weight": ones, f"{name}post_attention_layernorm.weight": ones}
    tensors["model.norm.weight"] = ones
    write_checkpoint(folder, tensors, config={**CONFIG, "num_hidden_layers": layers}, shards=4)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(TOKENS)))
    return folder
