"""Tiny checkpoints of published model types, the same bytes everywhere: python -m tests.tiny_models OUT [TYPE ...]

Each has the names, shapes and dtypes that the Hub's checkpoints of its type have: transformers' class is built on the
meta device, saved names are what its own conversion back gives, and layers for multi-token prediction are added as
published. config.json is as save_pretrained writes it. Values come from a generator seeded by the tensor's name, by
integer arithmetic and one rounding, so that they do not depend on a mathematical library.

A golden of an engine's converter (tests/goldens) belongs to exactly these bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests import next_tokens, tiny_tokenizers
from tests.header_checkpoints import Tensors, entries, published
from tests.making import Raw, weights, write_safetensors
from tests.tiny_configs import ROWS, TINY, Tiny

SPECIAL_KEY = re.compile(r"(bos|eos|pad|decoder_start|[a-z_]*)_token_(?:id|index)$")
INTERN_SIZES = {4096: 64, 14336: 256, 92544: ROWS, 6144: 128}  # internlm2-7b's to tiny's; 6144 are q, k and v


# --- configurations


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with some values replaced, part by part; lists and rope settings are replaced whole."""
    made = dict(config)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(made.get(key), dict) and key.endswith("_config")
        made[key] = merged(made[key], value) if nested else value
    return made


def with_tiny_tokens(config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return a config whose numbers of special tokens are the tiny vocabulary's."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        named = SPECIAL_KEY.match(str(key))
        if isinstance(value, Mapping):
            made[key] = with_tiny_tokens(value, ids)
        elif named and isinstance(value, int):
            made[key] = ids.get(named[1], ids["other"])
        elif named and isinstance(value, list):
            made[key] = [ids.get(named[1], ids["other"])]
        else:
            made[key] = value
    return made


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, **(config.get("text_config") or {})}


def saved_config(config: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as save_pretrained writes it, with the published names of class and types."""
    made = json.loads(config.to_json_string(use_diff=True))
    made.pop("transformers_version", None)

    def renamed(found: dict[str, Any], original: Mapping[str, Any]) -> None:
        for key in ("architectures", "model_type"):
            if original.get(key):
                found[key] = original[key]
        for key, part in original.items():
            if isinstance(part, Mapping) and isinstance(found.get(key), dict):
                renamed(found[key], part)

    renamed(made, wanted)
    return {**made, "dtype": "bfloat16"}


# --- tensors


def without_numbers(name: str) -> str:
    return re.sub(r"\{[\d,-]+\}|(?<=\.)\d+(?=\.|$)", "#", name)


@cache
def published_dtypes(base: str) -> dict[str, str]:
    """Return the dtypes of a published layout's tensors, by their names without numbers."""
    return {without_numbers(pattern): dtype for pattern, dtype, _ in entries()[base]["tensors"]} if base else {}


def class_of(tiny: Tiny) -> tuple[dict[str, Any], Tensors]:
    """Return config.json and the tensors of transformers' class."""
    from transformers import CONFIG_MAPPING

    from loaders.lint.engines.transformers import Model, cleaned

    start = entries()[tiny.base]["config"] if tiny.base else {"model_type": tiny.model_type}
    wanted = with_tiny_tokens(merged(start, tiny.config), tiny_tokenizers.IDS[tiny.tokenizer])
    if not tiny.base and not tiny.as_published:
        defaults = CONFIG_MAPPING[tiny.model_type](**{k: v for k, v in wanted.items() if k != "model_type"})
        wanted = with_tiny_tokens(defaults.to_dict(), tiny_tokenizers.IDS[tiny.tokenizer]) | {"architectures": None}
    found = Model(cleaned(wanted), "plain")
    wanted["architectures"] = wanted.get("architectures") or [type(found.model).__name__]
    tensors = published(found)
    for pattern, replacement in tiny.renames:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return wanted if tiny.as_published else saved_config(found.model.config, wanted), tensors


def internlm2(tiny: Tiny) -> tuple[dict[str, Any], Tensors]:
    """Return config.json and the tensors of InternLM 2, which transformers has no class for."""
    entry = entries()[tiny.base]
    config = with_tiny_tokens(merged(entry["config"], tiny.config), tiny_tokenizers.IDS[tiny.tokenizer])
    tensors: Tensors = {}
    for pattern, dtype, shape in entry["tensors"]:
        for number in range(config["num_hidden_layers"]):
            name = re.sub(r"\{[\d,-]+\}", str(number), pattern)
            tensors[name] = dtype, tuple(INTERN_SIZES[size] for size in shape)
    return config, tensors


def in_stacks(tensors: Tensors) -> Tensors:
    """Return the tensors with the experts of a layer in two stacks, gate and up in one."""
    made: Tensors = {}
    counts = Counter(re.sub(r"experts\.\d+\.", "experts.", name) for name in tensors if ".experts." in name)
    for name, (dtype, shape) in tensors.items():
        stack, (rows, *columns) = re.sub(r"experts\.\d+\.(\w+)\.weight$", r"experts.\1", name), shape or (0,)
        if stack == name:
            made[name] = dtype, shape
        elif not name.endswith("up_proj.weight"):
            is_gate = stack.endswith("gate_proj")
            made[stack.replace("gate_proj", "gate_up_proj")] = (
                dtype, (counts[f"{stack}.weight"], rows * (2 if is_gate else 1), *columns)
            )  # fmt: skip
    return made


def in_mxfp4(tensors: Tensors) -> Tensors:
    """Return the tensors with stacks of experts as blocks of 32 codes and their scales, rows and columns exchanged."""
    made: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if re.search(r"experts\.\w+_proj$", name):
            experts, columns, rows = shape
            made[f"{name}_blocks"] = "U8", (experts, rows, columns // 32, 16)
            made[f"{name}_scales"] = "U8", (experts, rows, columns // 32)
        else:
            made[name] = dtype, shape
    return made


def in_fp4(tensors: Tensors) -> Tensors:
    """Return the tensors with each expert's matrix as two codes a byte, and a scale for 32 columns."""
    made: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if re.search(r"ffn\.experts\.\d+\.w\d\.weight$", name):
            made[name] = "I8", (shape[0], shape[1] // 2)
            made[name.removesuffix("weight") + "scale"] = "F8_E8M0", (shape[0], shape[1] // 32)
        else:
            made[name] = dtype, shape
    return made


def model_of(kind: str) -> tuple[dict[str, Any], Tensors]:
    """Return config.json, and the name, dtype and shape of every tensor."""
    tiny = TINY[kind]
    config, tensors = internlm2(tiny) if kind == "internlm2" else class_of(tiny)
    if tiny.next_tokens:
        tensors = tensors | next_tokens.FORMS[tiny.next_tokens](tensors, text_part(config))
    if tiny.stacked:
        tensors = in_stacks(tensors)
    if tiny.transposed:
        turned = {n: (dtype, shape) for n, (dtype, shape) in tensors.items() if ".experts." in n and len(shape) == 3}
        tensors |= {n: (dtype, (shape[0], shape[2], shape[1])) for n, (dtype, shape) in turned.items()}
    if tiny.mxfp4:
        tensors = in_mxfp4(tensors)
        config["quantization_config"] = entries()[tiny.base]["config"]["quantization_config"]
    tensors = in_fp4(tensors) if tiny.fp4 else tensors
    dtypes = published_dtypes(tiny.base)
    kept = {name: dtypes.get(without_numbers(name)) == "F32" for name in tensors}
    return config, {n: ("F32" if kept[n] else dtype, shape) for n, (dtype, shape) in sorted(tensors.items())}


# --- values


def uniform(name: str, count: int) -> np.ndarray:
    """Return float32 values in [-1, 1) that depend on the name alone: multiples of 2^-23, which are exact."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = np.random.PCG64(seed).random_raw((count + 1) // 2).view(np.uint32)[:count]
    return (bits >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


def values_of(name: str, shape: tuple[int, ...], *, centred: bool) -> np.ndarray:
    """Return values of a size that real models have, so that a tiny model computes finite logits that differ."""
    made, last = uniform(name, math.prod(shape)), name.rsplit(".", 1)[-1]
    if last == "A_log":
        return (made + 1) * np.float32(1.25)
    if last == "dt_bias" or name.endswith("dt_proj.bias"):
        return made - 3
    if last in ("D", "layer_scalar", "per_expert_scale", "scale") or (
        last == "weight" and re.search(r"norm\w*\.weight$|ln_\w+\.weight$", name, re.IGNORECASE)
    ):
        is_gate = "linear_attn.norm" in name
        return made * np.float32(0.125) + np.float32(0 if centred and not is_gate and last == "weight" else 1)
    return made * np.float32(0.0625 if last.endswith("bias") else 0.09375)


def filled(name: str, dtype: str, shape: tuple[int, ...], tiny: Tiny, config: Mapping[str, Any]) -> Raw:
    if dtype in ("I64", "I32"):  # a table of experts by token, or positions
        made = np.random.PCG64(len(name)).random_raw(math.prod(shape)) % 4
        return Raw(dtype, made.astype(np.int64 if dtype == "I64" else np.int32).reshape(shape))
    if dtype in ("U8", "I8", "F8_E8M0"):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        made = np.random.PCG64(seed).random_raw(math.prod(shape))
        codes = made % 4 + 118 if name.endswith(("scale", "_scales")) else made % 256  # 2^-9 to 2^-6
        return Raw(dtype, codes.astype(np.uint8).reshape(shape))
    return weights(values_of(name, shape, centred=tiny.centred).reshape(shape), dtype)


def make(kind: str, folder: Path) -> Path:
    """Write the tiny checkpoint of a type; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = model_of(kind)
    tiny = TINY[kind]
    ids = tiny_tokenizers.IDS[tiny.tokenizer]
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["pad"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tiny_tokenizers.write(tiny.tokenizer, folder)
    made = {name: filled(name, dtype, shape, tiny, config) for name, (dtype, shape) in tensors.items()}
    write_safetensors(folder / "model.safetensors", made)
    return folder


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    for kind in arguments[1:] or TINY:
        folder = make(kind, Path(arguments[0]) / kind)
        print(f"{kind:20} {(folder / 'model.safetensors').stat().st_size / 1e6:6.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
