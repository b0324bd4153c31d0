"""What a checkpoint says of its own quantization: config.json, files beside it, or tensors that look packed.

Every place in which a tool may say "this is quantized" is looked at here, so that none is passed over: whatever says so
has a name, which is decoded (`loaders/tensors/quantized_sources`) or refused by that name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loaders.architectures.mlx import is_stack, model_of
from loaders.architectures.mlx_config import settings_of
from loaders.quantization.schemes.bitsandbytes_int8 import SCALES
from loaders.specs import WeightSpec

HQQ_CODES = ".W_q"
MODELOPT_CONFIG = "hf_quant_config.json"
# Files in which tools describe their quantization beside config.json, each with the method of the tool that writes it.
METHOD_FILES = {
    MODELOPT_CONFIG: "modelopt",
    "quantize_config.json": "gptq",  # AutoGPTQ
    "quant_config.json": "awq",  # AutoAWQ
    "quantization_config.json": "auto-round",
}
MODELOPT = ("modelopt", "modelopt_fp4", "modelopt_fp8", "modelopt_mixed", "modelopt_mxfp8")  # one tool's, by engine
SAME = {"intel/auto-round": "auto-round", "auto_round": "auto-round", "autoround": "auto-round"}  # older spellings
BLOCK = "quantization_config"
BLOCKS = (BLOCK, "compression_config", "quantization")  # config.json's keys of a description; the last is MLX's
DEEPEST = 3  # levels of config.json that are searched for descriptions at places where none is read
# Settings that decide what codes stand for, by the names that tools give them. Two descriptions must agree on them.
DECIDING = {
    "bits": ("bits", "w_bit"),
    "group_size": ("group_size", "q_group_size"),
    "checkpoint_format": ("checkpoint_format",),
    "quant_algo": ("quant_algo",),
    "packing_format": ("packing_format",),
}
BNB_STATE = re.compile(r"(.*)\.quant_state\.bitsandbytes__(nf4|fp4)$")
# Endings of names that only bitsandbytes gives.
BNB_ENDS = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", f".{SCALES}")
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
CODES = (*FLOAT8, "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")  # dtypes that only quantized checkpoints have
# Endings of names that only packed weights and their scales have, with whose they are.
PACKED_ENDS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_global_scale": "compressed-tensors",
    ".weight_scale_2": "ModelOpt",
    ".weight_scale": "compressed-tensors, ModelOpt or BitNet",
    "_scale_inv": "FP8 by blocks",
    ".absmax": "bitsandbytes",
}
PACKED = tuple(PACKED_ENDS)


@dataclass(frozen=True, slots=True)
class Declaration:
    """What says that a checkpoint is quantized.

    method: config.json's quant_method, or a description of what cannot be read. place: where it is said. settings: what
    else is said there. problem: a sentence if two places contradict each other.
    """

    method: str
    place: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


def declaration(
    container: str, config: Mapping[str, Any], weights: Sequence[WeightSpec], aux: Collection[str],
    read: Callable[[str], Mapping[str, Any]],
) -> Declaration | None:  # fmt: skip
    """Return what says that a checkpoint is quantized; None for a plain one. `read` reads an auxiliary file.

    A GGUF always counts as quantized, since a plain one needs the same translation of names and row orders. mlx-lm's
    checkpoints are known by their "quantization" block or their stacked experts.
    """
    if container == "gguf":
        return Declaration("gguf", "the container")
    model, settings = model_of(config), settings_of(config)
    if settings is not None:
        return Declaration("mlx", "config.json", settings)
    if any(is_stack(model, spec.name) for spec in weights):
        return Declaration("mlx", "the names of its stacked experts")
    found = [*_in_config(config), *_in_files(aux, read)]
    if not found:
        return _by_tensors(weights)
    first, others = found[0], found[1:]
    settings = dict(first.settings)
    for other in others:
        problem = _contradiction(first, other)
        if problem is not None:
            return Declaration(first.method, first.place, first.settings, problem)
        settings = {**other.settings, **settings}
    return Declaration(first.method, first.place, settings)


def quantizes_weights(block: Mapping[str, Any]) -> bool:
    """Whether a block of compressed-tensors or ModelOpt quantizes weights, and not only a cache or activations."""
    if block.get("quant_method") == "compressed-tensors" and isinstance(block.get("config_groups"), Mapping):
        groups = block["config_groups"].values()
        has_weights = any(isinstance(group, Mapping) and group.get("weights") for group in groups)
        return has_weights or not isinstance(block.get("kv_cache_scheme"), Mapping)
    return not ("quant_algo" in block and block["quant_algo"] is None and block.get("kv_cache_quant_algo"))


# --- config.json and other files


def _in_config(config: Mapping[str, Any]) -> Iterator[Declaration]:
    """Yield config.json's declarations: what transformers reads, or what stands where no engine's reader looks."""
    nested = config.get("text_config")
    block, place = config.get(BLOCK), f"config.json's {BLOCK}"
    if block is None and isinstance(nested, Mapping):
        block, place = nested.get(BLOCK), f"config.json's text_config.{BLOCK}"
    if block is not None:
        if not isinstance(block, Mapping):
            yield Declaration(f"an unknown method: {place} is no object", place)
        elif quantizes_weights(block):
            method = block.get("quant_method")
            method = SAME.get(method, method) if isinstance(method, str) else "an unknown method"
            yield Declaration(method, place, block)
        return
    elsewhere = next(_elsewhere(config, "", DEEPEST), None)
    if elsewhere is not None:
        yield Declaration(f"as config.json's {elsewhere} says, which is not read there", f"config.json's {elsewhere}")


def _elsewhere(config: Mapping[str, Any], path: str, levels: int) -> Iterator[str]:
    for key, value in config.items():
        if key in BLOCKS and isinstance(value, Mapping) and value:
            yield path + key
        elif isinstance(value, Mapping) and levels > 1:
            yield from _elsewhere(value, f"{path}{key}.", levels - 1)


def _in_files(aux: Collection[str], read: Callable[[str], Mapping[str, Any]]) -> Iterator[Declaration]:
    for name, usual in METHOD_FILES.items():
        if name not in aux:
            continue
        found = read(name)
        nested = found.get("quantization")  # ModelOpt's file has its settings one level down
        settings = nested if usual == "modelopt" and isinstance(nested, Mapping) else found
        if not quantizes_weights(settings):
            continue
        method = settings.get("quant_method", settings.get("quantization_method"))
        if not isinstance(method, str):
            method = "awq" if "w_bit" in settings or "q_group_size" in settings else usual
        yield Declaration(SAME.get(method, method), name, settings)


def _contradiction(one: Declaration, other: Declaration) -> str | None:
    """Say on what two declarations differ, if it decides how weights are decoded."""
    methods = {"modelopt" if each.method in MODELOPT else each.method for each in (one, other)}
    if len(methods) > 1:
        return f"{one.place} says {one.method}, and {other.place} says {other.method}; remove the one that is stale"
    for key, names in DECIDING.items():
        first, second = (
            next((each.settings[n] for n in names if each.settings.get(n) is not None), None) for each in (one, other)
        )
        if first is not None and second is not None and first != second:
            return (
                f"{one.place} says {key} {first!r}, and {other.place} says {second!r}; remove the one that is stale, or"
                " correct it"
            )
    return None


# --- tensors


def looks_packed(spec: WeightSpec, names: Collection[str]) -> str | None:
    """Return whose packed weight, or part of one, a stored tensor looks like by its name and dtype; None if plain."""
    name, dtype = spec.name, spec.dtype.name
    if name.endswith(HQQ_CODES):
        return "hqq"
    if name.endswith(BNB_ENDS):
        return "bitsandbytes"
    if name.endswith(PACKED):
        return next(whose for end, whose in PACKED_ENDS.items() if name.endswith(end))
    if name.endswith("_blocks") and dtype == "U8" and name.removesuffix("_blocks") + "_scales" in names:
        return "MXFP4"
    if len(spec.shape) < 2:
        return None
    if dtype in CODES and name.endswith(("weight", "_proj")):
        return f"some method of {spec.dtype}"
    if name.endswith(".weight"):
        if dtype == "U32" and name.removesuffix("weight") + "scales" in names:
            return "mlx"
        if dtype in ("I8", "U8", "I32", "U32"):
            return f"some method of {spec.dtype}"
    return None


def _by_tensors(weights: Sequence[WeightSpec]) -> Declaration | None:
    """Return what tensors show where nothing is said; hqq's and bitsandbytes' describe themselves."""
    names = {spec.name for spec in weights}
    found: dict[str, str] = {}
    for spec in weights:
        whose = looks_packed(spec, names)
        if whose is not None:
            found.setdefault(whose, spec.name)
    for own in ("hqq", "bitsandbytes"):
        if own in found:
            return Declaration(own, f"the name of {found[own]}")
    if not found:
        return None
    whose, name = next(iter(found.items()))
    return Declaration(f"by its tensors, {name} first, {whose}, but no file says how", name)
