"""A checkpoint's config: its config.json, or what GGUF metadata or a packed manifest say instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loaders.architectures.gguf_config import FACTORS, config_of
from loaders.architectures.mlx import packed_expert_name
from loaders.checkpoints.config_types import check_config
from loaders.containers import gguf, packed
from loaders.errors import BadCheckpoint
from loaders.limits import CONFIG_VALUES, JSON_CONFIG
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.storage.json_files import read_json

# Weights that share a scale in packed checkpoints. Their files do not say it: the number is compiled into the engine.
PACKED_GROUP = 64
LARGEST_FACTORS = 1 << 16  # bytes: a head of 128 has 64 factors


def gguf_config(files: PinnedFiles, names: Sequence[str], weights: Sequence[WeightSpec]) -> dict[str, Any]:
    """Return the config.json that the metadata of a GGUF stands for; of a split GGUF, the metadata of its first file.

    Raises:
        BadCheckpoint: the files of a split GGUF are incomplete or out of order, or the metadata do not fit a config.
    """
    metadata = [gguf.plain(gguf.read_metadata(files, name)) for name in names]
    for number, each in enumerate(metadata):
        found = (each.get(gguf.SPLIT_NUMBER, 0), each.get(gguf.SPLIT_COUNT, 1))
        if found != (number, len(names)):
            raise BadCheckpoint(
                f"{names[number]}: it says it is file {found[0]} of {found[1]} (from 0), of {len(names)}"
            )
    wanted = metadata[0].get(gguf.SPLIT_TENSORS)
    if wanted is not None and wanted != len(weights):
        raise BadCheckpoint(f"{names[0]}: its model has {wanted} tensors, its files {len(weights)}; fetch them again")
    # config.json has one dtype. Norms and biases are float32 in most GGUFs, so the matrices decide.
    matrices = {spec.dtype.name for spec in weights if len(spec.shape) > 1}
    dtype = next((t for t, name in (("bfloat16", "BF16"), ("float16", "F16")) if name in matrices), "float32")
    return config_of(metadata[0], [spec.name for spec in weights], dtype, _rope_factors(files, weights))


def _rope_factors(files: PinnedFiles, weights: Sequence[WeightSpec]) -> np.ndarray | None:
    """Return the divisors of rotary frequencies, a tensor that is a setting of the model; None if there is none.

    Raises:
        BadCheckpoint: it is no list of numbers that can divide frequencies.
    """
    spec = next((spec for spec in weights if spec.name == FACTORS), None)
    if spec is None:
        return None
    if spec.dtype.name == "F32" and len(spec.shape) == 1 and spec.size <= LARGEST_FACTORS:
        found = np.frombuffer(files.read(spec.file, spec.offset, spec.offset + spec.size), np.float32)
        if found.size and np.all(np.isfinite(found) & (found > 0)):
            return found
    raise BadCheckpoint(f"{FACTORS}: expected float32 factors above 0, at most {LARGEST_FACTORS} bytes; fetch it again")


def packed_checkpoint(files: PinnedFiles) -> tuple[list[str], tuple[WeightSpec, ...], dict[str, Any]]:
    """Read a packed checkpoint: its files, its tensors, and its config with the quantization block that MLX writes.

    Raises:
        BadCheckpoint: as `packed.read`; or a quantized weight has no scales, or a shape that does not fit them.
    """
    own = read_config(files)
    found = packed.read(files, lambda layer, expert, part: packed_expert_name(own, layer, expert, part))
    listed = found.manifest.get("config")
    config = own or (listed if isinstance(listed, dict) else {})
    check_config(config, packed.MANIFEST)
    # The names of expert tensors depend on the model type. Without a config.json it is known only from the manifest,
    # which the first pass read; the second pass gives the experts their right names.
    if not own and config:
        found = packed.read(files, lambda layer, expert, part: packed_expert_name(config, layer, expert, part))
    config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    bits = {name.removesuffix(".weight"): n for name in found.by_name if (n := _word_bits(found, name)) is not None}
    if bits:
        [(usual, _)] = Counter(bits.values()).most_common(1)
        block: dict[str, Any] = {"group_size": PACKED_GROUP, "bits": usual, "mode": "affine"}
        block |= {name: {"group_size": PACKED_GROUP, "bits": n} for name, n in bits.items() if n != usual}
        config["quantization"] = config["quantization_config"] = block
    return list(found.files), tuple(found.by_name.values()), config


def _word_bits(found: packed.Packed, name: str) -> int | None:
    """Return the bits of a quantized weight, as its manifest or its shape says; None for any other tensor."""
    spec = found[name]
    if spec.dtype.name != "U32" or not name.endswith(".weight"):
        return None
    scales, biases = (found.by_name.get(name.removesuffix("weight") + part) for part in ("scales", "biases"))
    if scales is None or biases is None:
        raise BadCheckpoint(
            f"{name}: it is quantized, but its scales or biases are missing; fetch the checkpoint again"
        )
    words, groups = (each.shape[-1] if each.shape else 0 for each in (spec, scales))
    fitting = words * 32 // (groups * PACKED_GROUP) if groups else 0
    bits = found.bits.get(name, fitting)
    if words * 32 != bits * groups * PACKED_GROUP or bits not in packed.BITS:
        raise BadCheckpoint(
            f"{name}: {bits} bits ({packed.ASSUMED_BITS} where the manifest says none) in groups of {PACKED_GROUP} do"
            f" not fit words {list(spec.shape)} with scales {list(scales.shape)}; the manifest must say its bits"
        )
    return bits


def read_config(files: PinnedFiles) -> dict[str, Any]:
    """Read config.json; an empty dict if there is none. Errors as `read_json` and `check_config`."""
    if files.find("config.json") is None:
        return {}
    files.store.check_inside("config.json")  # before a word of what it links to could be said
    found = read_json(files, "config.json", JSON_CONFIG, CONFIG_VALUES)
    check_config(found, "config.json")
    return found
