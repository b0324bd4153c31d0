"""llama.cpp's architectures: the names of their tensors, and what else differs from transformers.

What is said of a model type is in the `gguf` section of its family's file, names in `gguf_names`. The facts are those
of llama.cpp's converter (its `conversion` package).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from loaders.architectures import gguf_names
from loaders.architectures.families import text_config
from loaders.architectures.family_files import added, known_types, section
from loaders.architectures.forms import Form, forms_of
from loaders.architectures.layer_kinds import CONDITIONS, layer_count
from loaders.errors import BadSpec, setting
from loaders.specs import RowOrder

# transformers' modules within a layer that most architectures have
MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
    "self_attn.k_norm", "input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# A model saved without its head, as sentence encoders are, has names without `model.`.
HF_LAYER = re.compile(r"^(?:(?:model|backbone)\.)?layers\.(\d+)\.(.+)\.(weight|bias)$")
# What the converter makes of the names of every model before it looks them up (filter_tensors in conversion/base.py).
COMMON_RENAMES = ((r"language_model\.", ""), (r"e_score_correction_bias$", "e_score_correction.bias"))
# Vectors that the converter calls a bias, and that llama.cpp loads for every architecture that has them in its table.
NO_BIASES = ("e_score_correction.bias", "expert_bias.bias", "router_bias.bias")
QUERIES, KEYS = ("self_attn.q_proj", "mixer.q_proj"), ("self_attn.k_proj", "mixer.k_proj")
EXPERT = re.compile(r"\.experts\.(\d+)(?=\.)")
GGUF_LAYER = re.compile(r"^blk\.(\d+)\.(.+)\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class GgufName:
    """The place of transformers' tensor in a GGUF: a name, and the expert's number in a stack."""

    name: str
    expert: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The way in which llama.cpp holds a model_type: the `gguf` section of its family's file.

    architecture: llama.cpp's name of it.
    classes: transformers' class for config.json by model_type, where a GGUF of it is read; empty where it is not.
    modules: further modules within a layer that are read from a GGUF, with {} for an expert's number; see MODULES.
    renames: [pattern, replacement] rows that the converter applies to names before it looks them up.
    forms: tensors that are held in another shape, or with other values; see `loaders.architectures.forms`.
    drop: patterns for published names of what is left out, each with the reason.
    permutes: rows of q and k are in another order: llama.cpp's rotary embedding pairs neighbours, transformers' pairs
    the halves of a head (`permute` in conversion/llama.py).
    has_factors: llama.cpp loads the tensor rope_freqs.weight.
    biases: the modules within a layer whose biases it loads.
    keys: its keys of metadata: [type, key of config.json, default] or [type, number]; null for one that it has not.
    made: words for keys that follow from several of config.json's; both are in `loaders.layouts.gguf.keys`.
    by_layer: words for keys with a value for each layer of the file; they are in `loaders.layouts.gguf.keys_by_layer`.
    activations: the values of hidden_act that it computes.
    own_rope: words make the keys of rotary embeddings, which differ from layer to layer.
    rounds_ramp: yarn's ramp is computed with a rounded range, whatever config.json says; a warning tells so.
    next_tokens: it has layers for multi-token prediction, after the others.
    next_names: [pattern, replacement] rows for the names of such layers: {} is the number of the layer, which is that
    of the others and the pattern's group `n`.
    variants: what differs for some models of a type, under a word of `loaders.architectures.layer_kinds`; a later one
    that holds goes before.
    layers: the number of config.json's layers.
    """

    architecture: str
    classes: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    forms: tuple[Form, ...] = ()
    drop: tuple[tuple[str, str], ...] = ()
    permutes: bool = False
    has_factors: bool = False
    biases: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    keys: Mapping[str, Any] = field(default_factory=dict)
    made: tuple[str, ...] = ()
    by_layer: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu", "swish")
    own_rope: bool = False
    rounds_ramp: bool = False
    next_tokens: bool = False
    next_names: tuple[tuple[str, str], ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: int = 0

    @property
    def name(self) -> str:
        return self.architecture

    def gguf_name(self, name: str) -> GgufName | None:
        """Return where transformers' tensor is in a GGUF, or None if the architecture has no such tensor."""
        name = self._renamed(name)
        expert = EXPERT.search(name)
        if expert is not None:
            name = EXPERT.sub(".experts", name)
        match = HF_LAYER.match(name)
        is_bias = name.endswith(".bias") and not name.endswith(NO_BIASES)
        if is_bias and (match is None or match[2] not in self.biases):
            return None
        found = gguf_names.gguf_name(self.architecture, name)
        return None if found is None else GgufName(found, None if expert is None else int(expert[1]))

    def _renamed(self, name: str) -> str:
        """Return the name under which the converter looks a tensor up."""
        for pattern, replacement in self.next_names:
            match = re.search(pattern, name)
            if match is not None:
                number = self.layers + int(match.groupdict().get("n", "0"))
                name = name[: match.start()] + replacement.format(number) + name[match.end() :]
                break
        for pattern, replacement in COMMON_RENAMES:
            name = re.sub(pattern, replacement, name)
        if name.startswith(("layers.", "embed_tokens.", "norm.")):
            name = f"model.{name}"
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def hf_name(self, name: str) -> str | None:
        """Return transformers' name of a GGUF's tensor, with {} for an expert's number; None if it is unknown."""
        tops = {f"{gguf}.weight": f"{hf}.weight" for hf, gguf in TOP_NAMES.items()}
        if name in tops:
            return tops[name]
        match = GGUF_LAYER.match(name)
        if match is None:
            return None
        layer, inner, suffix = match.groups()
        found = self._read_names().get(inner)
        if found is None or (suffix == "bias" and found not in self.biases):
            return None
        return f"model.layers.{layer}.{found}.{suffix}"

    def _read_names(self) -> Mapping[str, str]:
        """Return the modules within a layer by GGUF's names within it."""
        found = {}
        for module in (*MODULES, *self.modules):
            name = gguf_names.gguf_name(self.architecture, f"model.layers.0.{module.replace('.{}', '')}")
            if name is not None:
                found[name.removeprefix("blk.0.")] = module
        return found

    def row_order(self, name: str, rows: int, config: Mapping[str, Any], *, inverse: bool) -> RowOrder | None:
        """Return the order in which GGUF takes the rows of transformers' tensor `name`; with `inverse`, the way back.

        Raises:
            BadSpec: the rows do not divide into heads.
        """
        match = HF_LAYER.match(self._renamed(name))
        if not self.permutes or match is None or match[2] not in QUERIES + KEYS:
            return None
        heads = number(config, "num_attention_heads")
        if match[2] in KEYS:
            heads = number(config, "num_key_value_heads", heads)
        if heads < 1 or rows % (2 * heads):
            raise BadSpec(f"{name}: its {rows} rows do not divide into {heads} heads of an even size")
        return RowOrder(rows // heads, inverse)


@cache
def _architecture(model_type: object) -> Architecture | None:
    found = section(model_type, "gguf")
    return None if found is None else _made(found)


def _made(found: Mapping[str, Any]) -> Architecture:
    made: dict[str, Any] = {
        key: tuple(tuple(row) if isinstance(row, list) else row for row in value) if isinstance(value, list) else value
        for key, value in found.items()
    }
    return Architecture(**{**made, "forms": forms_of(found.get("forms", ()))})


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json.

    Raises:
        BadSpec: none here is for its model_type.
    """
    model_type = config.get("model_type")
    found = _architecture(model_type)
    if found is None:
        known = ", ".join(known_types("gguf"))
        raise BadSpec(
            f"{setting('layout')}: gguf knows no architecture for model_type {model_type!r}; it knows {known}"
        )
    for condition, changes in found.variants.items():
        if CONDITIONS[condition](config):
            found = _made(added(section(model_type, "gguf") or {}, changes))
    return replace(found, layers=layer_count(config) or 0)


@cache
def read_types() -> Mapping[str, tuple[str, ...]]:
    """Return the model types that a GGUF of an architecture may become, by the architecture's name."""
    found: dict[str, tuple[str, ...]] = {}
    for model_type in known_types("gguf"):
        architecture = _architecture(model_type)
        if architecture is not None and model_type in architecture.classes:
            found[architecture.name] = (*found.get(architecture.name, ()), model_type)
    return found


def architecture_named(name: object) -> Architecture | None:
    """Return the architecture that a GGUF gives as general.architecture, if such a GGUF is read."""
    types = read_types().get(name) if isinstance(name, str) else None
    return None if types is None else _architecture(types[0])


def number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a whole number of config.json.

    Raises:
        BadSpec: it is missing, negative, or not a whole number.
    """
    found = text_config(config, key)
    found = default if found is None else found
    if type(found) is not int or found < 0:
        raise BadSpec(f"config.json: expected a whole number as {key}, found {found!r}")
    return found


def experts_of(config: Mapping[str, Any]) -> int:
    """Return the number of experts in a layer; 0 for a dense model. transformers 5 renamed the key."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if text_config(config, key) is not None:
            return number(config, key)
    return 0
