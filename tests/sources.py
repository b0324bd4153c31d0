"""The same small Llama in every format that is read, and the presets that quantize it: docs/tested.md's second table.

Each source is quantized by a preset of every engine, and the output must be that of the source's plain form; see
tests/loaders/tensors/test_sources.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests import passes
from tests.making import (
    AWQ_ORDER,
    IN_ORDER,
    LLAMA,
    Raw,
    llama_tensors,
    packed_words,
    values_of,
    weights,
    write_checkpoint,
)

CONFIG = {**LLAMA, "hidden_size": 128, "num_hidden_layers": 1, "dtype": "bfloat16", "num_key_value_heads": 4}
TARGETS = {
    "bitsandbytes": "nf4",
    "hqq": "hqq4",
    "mlx-lm": "mlx_int4",
    "compressed-tensors": "w8a8",
    "llama.cpp": "gguf_q8_0",
    "bitnet": "ternary",
}
Build = Callable[[Path], Path]


def tensors() -> dict[str, Raw]:
    """Make a Llama of one layer; all matrices are 128 x 128 except those of the vocabulary."""
    rng = np.random.default_rng(0)
    found = {}
    for name, raw in llama_tensors(layers=1).items():
        shape = (128,) if raw.data.ndim == 1 else (96 if "embed" in name or "lm_head" in name else 128, 128)
        values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.05
        found[name] = weights(values.astype(np.float32), "BF16")
    return found


def write(folder: Path, found: Mapping[str, Raw], **config: Any) -> Path:
    write_checkpoint(folder, dict(found), config={**CONFIG, "intermediate_size": 128, **config}, shards=2)
    tokenizer = {
        "version": "1.0", "added_tokens": [{"id": 0, "content": "<|bos|>", "special": True, "normalized": False}],
        "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(1, 96)}, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def base(root: Path) -> Path:
    return write(root / "base", tensors())


def ours(preset: str, *settings: str) -> Build:
    """Build a source by weightmill itself; tests/parity compares such outputs with the engines' own."""
    return lambda root: passes.run(base(root), root / "made", preset, settings=settings)[preset].folder


def replaced(parts: Callable[[str, np.ndarray], dict[str, Raw]], block: Mapping[str, Any]) -> Build:
    """Build a source whose layer's matrices are replaced by `parts` of their names and values."""

    def build(root: Path) -> Path:
        found: dict[str, Raw] = {}
        for name, raw in tensors().items():
            found |= parts(name, values_of(raw)) if "_proj." in name else {name: raw}
        return write(root / "source", found, quantization_config=dict(block))

    return build


def fp8_block(name: str, values: np.ndarray) -> dict[str, Raw]:
    """Make random codes in blocks of 48 x 80, which do not divide 128, so that edge blocks are smaller."""
    rng = np.random.default_rng(len(name))
    codes = rng.integers(0, 0x70, values.shape, dtype=np.uint8) | (rng.integers(0, 2, values.shape, np.uint8) << 7)
    scales = np.exp2(rng.uniform(-10, -6, (3, 2))).astype(np.float32)
    return {name: Raw("F8_E4M3", codes), name + "_scale_inv": Raw("F32", scales)}


def awq(name: str, values: np.ndarray) -> dict[str, Raw]:
    codes, zeros, scales = _integers(name)
    return _packed(name, codes, zeros, scales, AWQ_ORDER, along=1)


def gptq(name: str, values: np.ndarray) -> dict[str, Raw]:
    codes, zeros, scales = _integers(name)
    parts = _packed(name, codes, zeros - 1, scales, IN_ORDER, along=0)
    return parts | {name.replace("weight", "g_idx"): Raw("I32", (np.arange(128) // 32).astype(np.int32))}


def gptq_raw(name: str, values: np.ndarray) -> dict[str, Raw]:
    """GPTQ's words with zeros as they are, and without the groups of inputs: AutoRound's."""
    return _packed(name, *_integers(name), IN_ORDER, along=0)


def _integers(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(name))
    scales = (rng.random((4, 128)) * 0.01).astype(np.float16)
    return rng.integers(0, 16, (128, 128)), rng.integers(1, 16, (4, 128)), scales


def _packed(
    name: str, codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, order: tuple[int, ...], along: int
) -> dict[str, Raw]:
    words = packed_words(codes, order) if along else packed_words(codes.T, order).T
    return {
        name.replace("weight", "qweight"): Raw("I32", words),
        name.replace("weight", "qzeros"): Raw("I32", packed_words(zeros, order)),
        name.replace("weight", "scales"): Raw("F16", scales),
    }


def modelopt_nvfp4(name: str, values: np.ndarray) -> dict[str, Raw]:
    rng = np.random.default_rng(len(name))
    return {
        name: Raw("U8", rng.integers(0, 256, (128, 64), dtype=np.uint8)),
        name + "_scale": Raw("F8_E4M3", rng.integers(1, 127, (128, 8), dtype=np.uint8)),
        name + "_scale_2": Raw("F32", np.array(0.003, np.float32)),
    }


def modelopt_fp8(name: str, values: np.ndarray) -> dict[str, Raw]:
    codes = np.random.default_rng(len(name)).integers(0, 0x70, values.shape, dtype=np.uint8)
    return {name: Raw("F8_E4M3", codes), name + "_scale": Raw("F32", np.array(0.01, np.float32))}


def fp8_rows(name: str, values: np.ndarray) -> dict[str, Raw]:
    rng = np.random.default_rng(len(name))
    codes, scales = rng.integers(0, 0x70, values.shape, dtype=np.uint8), rng.random((128, 1)) * 0.01
    return {name: Raw("F8_E4M3", codes), name + "_scale": Raw("F32", scales.astype(np.float32))}


def modelopt_mixed(name: str, values: np.ndarray) -> dict[str, Raw]:
    return (modelopt_nvfp4 if "mlp" in name else fp8_rows)(name, values)


def mixed_layers() -> dict[str, dict[str, str]]:
    """Say of each matrix what ModelOpt made of it."""
    modules = [name.removesuffix(".weight") for name in tensors() if "_proj." in name]
    return {m: {"quant_algo": "W4A16_NVFP4" if "mlp" in m else "FP8_PER_CHANNEL_PER_TOKEN"} for m in modules}


def gpt_oss(root: Path) -> Path:
    """Write a gpt-oss model of two experts in MXFP4; other tensors are named as by its class in transformers."""
    rng, found = np.random.default_rng(0), tensors()
    mlp = "model.layers.0.mlp."
    found = {name: raw for name, raw in found.items() if not name.startswith(mlp)}
    for name, rows in (("q_proj", 128), ("k_proj", 128), ("v_proj", 128), ("o_proj", 128), ("sinks", 4)):
        name = f"model.layers.0.self_attn.{name}" + (".bias" if name != "sinks" else "")
        found[name] = weights(rng.standard_normal(rows).astype(np.float32), "BF16")
    found[mlp + "router.weight"] = weights(rng.standard_normal((2, 128)).astype(np.float32), "BF16")
    found[mlp + "router.bias"] = weights(rng.standard_normal(2).astype(np.float32), "BF16")
    for name, rows in (("gate_up_proj", 256), ("down_proj", 128)):
        blocks, scales = (
            rng.integers(0, 256, (2, rows, 4, 16), np.uint8),
            rng.integers(115, 125, (2, rows, 4), np.uint8),
        )
        found |= {f"{mlp}experts.{name}_blocks": Raw("U8", blocks), f"{mlp}experts.{name}_scales": Raw("U8", scales)}
        found[f"{mlp}experts.{name}_bias"] = weights(rng.standard_normal((2, rows)).astype(np.float32), "BF16")
    config = {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 32}
    return write(root / "source", found, **config, quantization_config={"quant_method": "mxfp4"})


def pytorch(root: Path) -> Path:
    return passes.run(base(root), root / "made", "none", settings=("output.container=pytorch",))["none"].folder


FP8 = {"quant_method": "fp8", "weight_block_size": [48, 80]}
INT4 = {"bits": 4, "group_size": 32}
AUTO_ROUND = {**INT4, "quant_method": "auto-round", "sym": False, "data_type": "int"}
MODELOPT_MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": mixed_layers()}
COMPRESSED = ("fp8_dynamic", "fp8_block", "w8a8", "w8a16", "w4a16", "w4a16_asym", "nvfp4a16", "mxfp4a16", "mxfp4")
SOURCES: dict[str, dict[str, Build]] = {  # a row: the forms that it stands for, the first goes to every engine
    "safetensors": {"safetensors": base},
    "PyTorch `.bin`": {"pytorch": pytorch},
    "GGUF": {"gguf": ours("gguf_bf16"), "gguf q8_0": ours("gguf_q8_0"), "gguf q4_0": ours("gguf_q4_0")},
    "bitsandbytes 4-bit": {
        "nf4": ours("nf4"),
        "nf4 double": ours("nf4", "quant.double_quant=true"),
        "fp4": ours("fp4"),
    },
    "bitsandbytes int8": {"int8": ours("int8")},
    "BitNet": {"ternary": ours("ternary")},
    "HQQ": {"qmodel.pt": ours("hqq4"), "safetensors hqq": ours("hqq3", "output=hf")},
    "MLX": {p: ours(p) for p in ("mlx_int4", "mlx_int8", "mlx_mxfp4", "mlx_mxfp8", "mlx_nvfp4")},
    "compressed-tensors": {preset: ours(preset) for preset in COMPRESSED},
    "FP8 block (DeepSeek)": {"fp8": replaced(fp8_block, FP8)},
    "AWQ": {"awq": replaced(awq, {**INT4, "quant_method": "awq", "version": "gemm", "zero_point": True})},
    "GPTQ": {"gptq": replaced(gptq, {**INT4, "quant_method": "gptq", "desc_act": False, "sym": False})},
    "AutoRound": {
        "auto-round": replaced(gptq_raw, {**AUTO_ROUND, "packing_format": "auto_round"}),
        "auto-round gptq": replaced(gptq, {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}),
        "auto-round awq": replaced(awq, {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}),
    },
    "FP8 by rows (fbgemm, vLLM)": {
        "fbgemm": replaced(fp8_rows, {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}),
        "fp8 rows": replaced(fp8_rows, {"quant_method": "fp8", "activation_scheme": "static"}),
    },
    "ModelOpt NVFP4": {"nvfp4": replaced(modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"})},
    "gpt-oss MXFP4": {"mxfp4 gpt-oss": gpt_oss},
    "ModelOpt FP8": {"fp8 modelopt": replaced(modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"})},
    "ModelOpt mixed": {"mixed": replaced(modelopt_mixed, MODELOPT_MIXED)},
}


def table() -> str:
    """Return the table as docs/tested.md shows it."""
    lines = [f"| source | {' | '.join(TARGETS)} |", "|---" * (len(TARGETS) + 1) + "|"]
    for row in SOURCES:
        lines.append(f"| {row} | {' | '.join('same' for _ in TARGETS)} |")
    return "\n".join(lines)
