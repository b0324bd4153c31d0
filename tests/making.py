"""Small checkpoints for tests, written without the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Raw:
    """An array of bits with a safetensors dtype, since numpy has no bfloat16."""

    def __init__(self, dtype: str, data: np.ndarray) -> None:
        self.dtype = dtype
        self.data = np.asarray(data, order="C")  # np.ascontiguousarray would give a scalar one dimension.


def weights(values: np.ndarray, dtype: str) -> Raw:
    """Round float32 values to a dtype, to nearest, ties to even."""
    values = np.asarray(values, np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return Raw("BF16", np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16))
    return Raw(dtype, values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]))


def values_of(raw: Raw) -> np.ndarray:
    """Convert bits to float32."""
    if raw.dtype == "BF16":
        return (raw.data.astype(np.uint32) << 16).view(np.float32)
    return raw.data.astype(np.float32)


def write_safetensors(path: Path, tensors: Mapping[str, Raw]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, raw in tensors.items():
        header[name] = {
            "dtype": raw.dtype,
            "shape": list(raw.data.shape),
            "data_offsets": [offset, offset + raw.data.nbytes],
        }
        offset += raw.data.nbytes
    write_header(path, header, b"".join(raw.data.tobytes() for raw in tensors.values()))


def write_header(path: Path, header: Any, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def read_safetensors(folder: Path) -> dict[str, Raw]:
    """Read all tensors of a folder, by code that is simple enough to be checked by eye."""
    found = {}
    kinds = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64, "U8": np.uint8,
             "I64": np.int64, "BOOL": np.uint8, "I8": np.int8, "F8_E8M0": np.uint8, "F8_E4M3": np.uint8,
             "I32": np.int32, "U32": np.uint32}  # fmt: skip
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        [length] = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = (8 + length + o for o in entry["data_offsets"])
                array = np.frombuffer(data[start:stop], kinds[entry["dtype"]]).reshape(entry["shape"])
                found[name] = Raw(entry["dtype"], array)
    return found


def llama_tensors(dtype: str = "BF16", *, tied: bool = False, seed: int = 0, layers: int = 2) -> dict[str, Raw]:
    """Make a Llama of LLAMA's sizes with random weights."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Raw:
        return weights(rng.standard_normal((rows, columns)).astype(np.float32) * 0.05, dtype)

    def ones() -> Raw:
        return weights(np.ones(64, np.float32), dtype)

    tensors = {"model.embed_tokens.weight": matrix(96, 64)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        tensors[name + "self_attn.q_proj.weight"] = matrix(64, 64)
        tensors[name + "self_attn.k_proj.weight"] = matrix(32, 64)
        tensors[name + "self_attn.v_proj.weight"] = matrix(32, 64)
        tensors[name + "self_attn.o_proj.weight"] = matrix(64, 64)
        tensors[name + "mlp.gate_proj.weight"] = matrix(128, 64)
        tensors[name + "mlp.up_proj.weight"] = matrix(128, 64)
        tensors[name + "mlp.down_proj.weight"] = matrix(64, 128)
        tensors[name + "input_layernorm.weight"] = ones()
        tensors[name + "post_attention_layernorm.weight"] = ones()
    tensors["model.norm.weight"] = ones()
    if not tied:
        tensors["lm_head.weight"] = matrix(96, 64)
    return tensors


def write_moe(folder: Path) -> Path:
    """Write a Qwen3-MoE with two experts in its first layer."""
    tensors = llama_tensors()
    matrix = tensors["model.layers.0.mlp.up_proj.weight"]
    for expert in range(2):
        for part in ("gate", "up", "down"):
            tensors[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"] = matrix
    tensors["model.layers.0.mlp.gate.weight"] = Raw("BF16", matrix.data[:2])
    return write_checkpoint(folder, tensors, config={**LLAMA, "model_type": "qwen3_moe", "dtype": "bfloat16"})


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Raw] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    index: bool = True,
) -> Path:
    """Write a folder as transformers writes it, with a tokenizer, a chat template and remote code."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = llama_tensors() if tensors is None else dict(tensors)
    names = sorted(tensors)
    if config is None:
        dtype = TORCH_NAMES[tensors[names[0]].dtype]
        config = {**LLAMA, "dtype": dtype, "tie_word_embeddings": "lm_head.weight" not in tensors}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "extra").mkdir(exist_ok=True)
    (folder / "extra" / "modeling.py").write_text("raise SystemExit('remote code must never run')\n")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", {n: tensors[n] for n in names})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        write_safetensors(folder / file, {n: tensors[n] for n in part})
        weight_map.update(dict.fromkeys(part, file))
    if index:
        total = sum(raw.data.nbytes for raw in tensors.values())
        write_index(folder, weight_map, total)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, str], total: int = 0) -> None:
    document = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def snapshot(folder: Path, ignore: Sequence[str] = ()) -> dict[str, bytes]:
    """Return the bytes of every file of a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ignore
    }


def tokenizer(tokens: int) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE without merges."""
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<|bos|>", "special": True, "normalized": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(1, tokens)}, "merges": []},
    }


def make_source(folder: Path, tensors: Any = None, **config: Any) -> Path:
    tensors = llama_tensors() if tensors is None else tensors
    made = {**LLAMA, "dtype": "bfloat16", "tie_word_embeddings": "lm_head.weight" not in tensors, **config}
    write_checkpoint(folder, tensors, config=made, shards=2)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(96)))
    (folder / "LICENSE").write_text("as you like")
    return folder


# --- AWQ and GPTQ


def packed_words(codes: np.ndarray, order: tuple[int, ...], bits: int = 4) -> np.ndarray:
    """Pack codes along the last dimension into int32 words: code order[i] of a word begins at its bit i * bits."""
    each = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), np.uint32)
    for i in range(each):
        words |= codes[..., order[i] :: each].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(16))
