"""A checkpoint of a gigabyte of dense random weights, written quickly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from tests.making import Raw, write_safetensors

HIDDEN, INNER, LAYERS, VOCABULARY = 2048, 5504, 10, 2048
SHIFT = 1009  # a prime: no multiple of it below 2048 * 1009 is one of a row's length


def bytes_of(folder: Path) -> int:
    """The bytes of its weights, as its index says."""
    size = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert isinstance(size, int)
    return size


def write_large(folder: Path) -> None:
    """Write it, a file a block. No two rows are alike, none is zero."""
    folder.mkdir()
    # bfloat16 of magnitudes from 2^-7 to 2^-5: random signs, mantissas and one bit of the exponent
    bits = np.frombuffer(np.random.default_rng(0).bytes(2 * (HIDDEN * INNER + SHIFT * LAYERS * 8)), np.uint16)
    numbers, starts = (bits & np.uint16(0x80FF)) | np.uint16(0x3C00), itertools.count(0, SHIFT)

    def matrix(rows: int, columns: int) -> Raw:
        """A window of the same numbers: each begins where no row of another begins."""
        start = next(starts)
        return Raw("BF16", numbers[start : start + rows * columns].reshape(rows, columns))

    ones = Raw("BF16", np.full(HIDDEN, 0x3F80, np.uint16))
    size = 0

    def put(file: str, tensors: dict[str, Raw]) -> None:
        nonlocal size
        size += sum(raw.data.nbytes for raw in tensors.values())
        files.update(dict.fromkeys(tensors, file))
        write_safetensors(folder / file, tensors)

    files: dict[str, str] = {}
    count = LAYERS + 1
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        put(
            f"model-{layer + 1:05d}-of-{count:05d}.safetensors",
            {
                **{f"{name}self_attn.{p}_proj.weight": matrix(HIDDEN, HIDDEN) for p in "qkvo"},
                f"{name}mlp.gate_proj.weight": matrix(INNER, HIDDEN),
                f"{name}mlp.up_proj.weight": matrix(INNER, HIDDEN),
                f"{name}mlp.down_proj.weight": matrix(HIDDEN, INNER),
                f"{name}input_layernorm.weight": ones,
                f"{name}post_attention_layernorm.weight": ones,
            },
        )
    put(
        f"model-{count:05d}-of-{count:05d}.safetensors",
        {
            "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
            "lm_head.weight": matrix(VOCABULARY, HIDDEN),
            "model.norm.weight": ones,
        },
    )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": files})
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
