"""The layout of transformers: the parts of a weight beside it by suffix, and a quantization_config in config.json.

The blocks are those that transformers 5.23 writes for the same settings (utils/quantization_config.py,
BitsAndBytesConfig and BitNetQuantConfig). Which modules its loader converts is decided by `should_convert_module`
(quantizers/quantizers_utils.py) with the skip list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from loaders.architectures.family import Family, family_of, load_dtype
from loaders.architectures.renames import inside
from loaders.architectures.stacks import ONLY_STACKED
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec, setting
from loaders.layouts import compressed_tensors
from loaders.layouts.base import Placed
from loaders.layouts.engines import builds_own_class, wants_stacks
from loaders.layouts.inside_names import may_be_linear, modules_within, skip_names, tied_entries
from loaders.patterns import compiled
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitnet import Ternary
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.quantization.schemes.hqq import Hqq
from loaders.quantization.schemes.plain import Plain
from loaders.rules.defaults import LINEAR, OTHER_LINEAR
from loaders.rules.rule import Decision
from loaders.specs import OutputFile, StoredTensor
from loaders.tensors.logical_tensor import stored_name

QUANTIZATION_KEYS = ("quantization_config", "quantization")  # transformers' key, and mlx-lm's
# Routers that are an nn.Linear in transformers' classes, so that its loader would convert them.
LINEAR_ROUTERS = ("shared_expert_gate.weight", "feed_forward.router.weight")
UNCONVERTED = ("falcon",)  # model types whose linear layers are a subclass of nn.Linear: FalconLinear
SINGLE = re.compile(r"\.experts\.\d+\.")
DEFAULT_HEADS = ("head",)  # the roles that transformers' loaders skip by default


class HfLayout:
    """The layout of transformers; see `Layout`."""

    name: ClassVar[str] = "hf"
    containers: ClassVar[tuple[str, ...]] = ("safetensors", "pytorch")
    file: ClassVar[str | None] = None

    def about(self, checkpoint: Checkpoint, placed: Sequence[Placed]) -> Any:
        return None

    def place(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> tuple[Placed, ...]:
        return place(decisions, checkpoint.config)

    def warnings(self, decisions: Sequence[Decision]) -> tuple[str, ...]:
        if any(isinstance(decision.scheme, Hqq) for decision in decisions):
            return (_hqq_is_for(),)
        return ()

    def config(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None
    ) -> dict[str, Any] | None:
        if not checkpoint.config:
            return None
        return config_json(checkpoint.config, decisions, checkpoint.family, compute_dtype)

    def index(self, files: Sequence[OutputFile], total_bytes: int, parameters: int) -> Mapping[str, Any] | None:
        if len(files) == 1:
            return None
        weight_map = {slot.name: file.name for file in files for slot in file.slots}
        return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def place(decisions: Sequence[Decision], config: Mapping[str, Any]) -> tuple[Placed, ...]:
    """Name what will be stored. Weights to be quantized are first cast as transformers casts them when it loads them.

    Raises:
        BadSpec: transformers could not load it.
    """
    wanted = load_dtype(config)
    placed = []
    _check_converted(decisions, config)
    engines = {decision.scheme.engine for decision in decisions if decision.scheme is not None}
    family = family_of(config)
    is_whole = builds_own_class(engines) and all(wants_stacks(engine, family) for engine in engines)
    has_stacks = bool(family.stacks) and not family.is_generic
    is_stacked = is_whole and (has_stacks or config.get("model_type") in ONLY_STACKED)
    for decision in decisions:
        tensor, encoding = decision.tensor, decision.encoding
        if encoding is None:
            continue
        if is_stacked and SINGLE.search(tensor.name):
            raise BadSpec(
                f"{setting('layout')}: transformers' {config['model_type']} holds experts in stacks, and this source"
                " has them"
                f" one by one ({tensor.name} first), which is not put together again; choose {setting('layout')}=mlx,"
                " or a quant of"
                " compressed-tensors"
            )
        if decision.action == "quantize" and tensor.role == "expert" and len(tensor.shape) == 3:
            raise BadSpec(
                f"{decision.rule.label or setting('quantize')}: {tensor.name} {list(tensor.shape)} is a stack of"
                " experts, which transformers loads as one parameter and"
                f" {encoding.scheme.engine} does not quantize; take experts out of the rule, or choose a quant of"
                " compressed-tensors or MLX, which quantize experts of the model types that they know"
            )
        if encoding.action == "quantize" and wanted != tensor.dtype:
            encoding = replace(encoding, cast=wanted)
        stored = {role: StoredTensor(stored_name(tensor.name, role), part) for role, part in encoding.stored.items()}
        placed.append(Placed(encoding, stored))
    return tuple(placed)


def _check_converted(decisions: Sequence[Decision], config: Mapping[str, Any]) -> None:
    """Check that transformers converts the layers of this model type at all.

    Raises:
        BadSpec: it converts none, and would not load quantized ones.
    """
    if config.get("model_type") in UNCONVERTED and any(
        decision.action == "quantize" and decision.scheme is not None and decision.scheme.engine == "bitsandbytes"
        for decision in decisions
    ):
        raise BadSpec(
            f"{setting('quantize')}: transformers with bitsandbytes quantizes no layer of model_type"
            f" {config['model_type']}, all of a class of its own that is no plain nn.Linear, and would not load them"
            " quantized; choose another engine"
        )


# --- config.json


def config_json(
    config: Mapping[str, Any], decisions: Sequence[Decision], family: Family, compute_dtype: str | None
) -> dict[str, Any]:
    """Return the source's config.json with what the engine must know of the quantization.

    Raises:
        BadSpec: the engine's skip list cannot express which modules are quantized.
    """
    made = dict(config) if is_copied(decisions) else plain_config(config)
    schemes = {d.scheme for d in decisions if d.action == "quantize" and d.scheme is not None}
    casts = {d.scheme.dtype for d in decisions if d.action == "cast" and isinstance(d.scheme, Plain)}
    if not schemes:
        if len(casts) == 1 and (dtype := next(iter(casts))) is not None:
            key = "torch_dtype" if "torch_dtype" in made and "dtype" not in made else "dtype"
            made[key] = DTYPES[dtype].torch
        return made
    if all(scheme.engine == compressed_tensors.ENGINE for scheme in schemes):
        made["quantization_config"] = compressed_tensors.config_block(decisions, config, family)
        return made
    made["quantization_config"] = quantization_block(config, decisions, skip_list(decisions, family), compute_dtype)
    return made


def quantization_block(
    config: Mapping[str, Any], decisions: Sequence[Decision], skip: list[str] | None, compute_dtype: str | None
) -> dict[str, Any]:
    """Return the quantization_config of all quantized tensors; `skip` as `quantization_config` takes it.

    Raises:
        BadSpec: they need different ones, and there is place for one.
    """
    schemes = {d.scheme for d in decisions if d.action == "quantize" and d.scheme is not None}
    dtype = compute_dtype or _model_dtype(config, decisions)
    blocks = [quantization_config(scheme, skip, dtype) for scheme in schemes]
    for block in blocks[1:]:
        differing = [key for key in blocks[0] if block.get(key) != blocks[0][key]]
        if differing:
            raise BadSpec(
                f"rules: tensors differ in {', '.join(differing)}, for which config.json has one place only; give all"
                " the same"
            )
    return blocks[0]


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without its quantization_config, at the top and in the text part."""
    made = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(made.get("text_config"), Mapping):
        made["text_config"] = {k: v for k, v in made["text_config"].items() if k not in QUANTIZATION_KEYS}
    return made


def is_copied(decisions: Sequence[Decision]) -> bool:
    """Whether the source's own quantization stays, because its tensors are copied as they are stored."""
    return all(decision.tensor.decode is None for decision in decisions)


def _model_dtype(config: Mapping[str, Any], decisions: Sequence[Decision]) -> str:
    """Return torch's name of the dtype in which the engine will compute by default."""
    dtype = load_dtype(config) or next(d.tensor.dtype for d in decisions if d.action == "quantize")
    return dtype.torch if dtype.name != "F64" else "float32"


def quantization_config(scheme: Scheme, skip: list[str] | None, compute_dtype: str) -> dict[str, Any]:
    """Return an engine's quantization_config. `skip` is None where the engine's own defaults say the same."""
    if isinstance(scheme, Bnb4 | LlmInt8):
        four = scheme if isinstance(scheme, Bnb4) else None
        return {
            "_load_in_4bit": four is not None,
            "_load_in_8bit": four is None,
            # transformers writes the 4-bit keys for int8 too, with their defaults, which mean nothing there
            "bnb_4bit_compute_dtype": compute_dtype if four else "float32",
            "bnb_4bit_quant_storage": four.storage if four else "uint8",
            "bnb_4bit_quant_type": four.table if four else "fp4",
            "bnb_4bit_use_double_quant": four is not None and four.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skip,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four is not None,
            "load_in_8bit": four is None,
            "quant_method": "bitsandbytes",
        }
    if isinstance(scheme, Hqq):
        return {
            "quant_config": {
                "offload_meta": False,
                "scale_quant_params": None,
                "weight_quant_params": {
                    "axis": scheme.axis,
                    "channel_wise": True,
                    "group_size": scheme.group_size,
                    "nbits": scheme.bits,
                    "optimize": True,
                    "round_zero": scheme.rounds_zero,
                    "view_as_float": False,
                },
                "zero_quant_params": None,
            },
            "quant_method": "hqq",
            "skip_modules": ["lm_head"] if skip is None else skip,
        }
    assert isinstance(scheme, Ternary), scheme
    return {
        "quant_method": "bitnet",
        "linear_class": scheme.linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"] if skip is None else skip,
    }


def skip_list(decisions: Sequence[Decision], family: Family) -> list[str] | None:
    """Return the linear modules that stay as they are; None where the engine's defaults cover them.

    A list replaces the defaults, so that it names the head too. The defaults leave out the last module, whatever it is,
    so that models of unknown families always have a list.

    Raises:
        BadSpec: a quantized module's name matches a kept one's, as transformers compares them.
    """
    quantized = sorted(_module(d) for d in decisions if d.action == "quantize")
    kept = {_module(d) for d in decisions if d.action in ("keep", "cast") and _is_linear(d, family)}
    heads = {_module(d) for d in decisions if d.tensor.role in DEFAULT_HEADS and len(d.tensor.shape) == 2}
    if kept == heads.difference(quantized) and not heads.intersection(quantized) and not family.is_generic:
        return None
    if kept and not heads and not family.is_generic:
        kept |= {name.removesuffix(".weight") for _, name in family.tied if name.endswith(".weight")}.difference(
            quantized
        )
    skip = sorted(kept)
    caught = [module for module in quantized if is_skipped(module, skip)]
    if caught:
        raise BadSpec(
            f"rules: {caught[0]} is quantized, but transformers would skip it, since the name of a kept module"
            f" ends or begins like it; keep both or neither ({', '.join(caught[:4])})"
        )
    if family.is_generic:
        plain = [d for d in decisions if d.action in ("keep", "cast")]
        # What is taken for a table by its name may be a linear layer all the same.
        doubtful = {_module(d) for d in plain if may_be_linear(d)}
        doubtful.update(name for d in plain for name in modules_within(d.tensor.name, family))
        tied = tied_entries(family, kept, has_head=bool(heads)) if kept & heads or not heads else ()
        taken = {each for name in quantized for each in (name, inside(name, family.names.model_types))}
        return skip_names(skip, doubtful, tied, family, lambda entry: any(is_skipped(name, [entry]) for name in taken))
    return skip


def is_skipped(module: str, patterns: Sequence[str]) -> bool:
    """Whether transformers leaves a module alone: should_convert_module in quantizers/quantizers_utils.py.

    A pattern is a regular expression for the beginning of a name, up to a dot or the end, or the end of a name.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    where = "the list of modules that stay plain"
    return any(module.endswith(p) or compiled(rf"(?:{p}){boundary}", where).match(module) for p in patterns)


def _module(decision: Decision) -> str:
    return decision.tensor.name.removesuffix(".weight")


def _is_linear(decision: Decision, family: Family) -> bool:
    """Whether the tensor is the weight of an nn.Linear, which transformers' loader would convert.

    Which routers are, is not known of unknown families: an entry for one that is none does no harm.
    """
    tensor = decision.tensor
    is_router = (tensor.role == "router" and family.is_generic) or tensor.name.endswith(LINEAR_ROUTERS)
    is_layer = tensor.role in (*LINEAR, *OTHER_LINEAR, "conv1d", "head") or is_router
    return is_layer and len(tensor.shape) == 2 and tensor.name.endswith(".weight")


def _hqq_is_for() -> str:
    return (
        "transformers 5 does not load HQQ, and does not fail either: it warns of missing weights and computes with"
        " random ones. This layout is for transformers 4 (on a CPU only with torch_dtype=torch.float32);"
        f" {setting('layout')}=hqq, the default, is for the hqq package, which loads it beside transformers 4 and 5"
    )
