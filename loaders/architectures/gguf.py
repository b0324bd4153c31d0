"""llama.cpp's architectures: the names of their tensors, and what else differs from transformers.

What is said of a model type is in the `gguf` section of its family's file, names in `gguf_names`. The facts are those
of llama.cpp's converter (its `conversion` package).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from loaders.architectures import gguf_names
from loaders.architectures.family import text_config
from loaders.architectures.family_files import added, known_types, others_known, section
from loaders.architectures.forms import Form, forms_of
from loaders.architectures.gguf_types import is_float32, is_quantized
from loaders.architectures.layer_kinds import CONDITIONS, layer_count
from loaders.dtypes import Shape
from loaders.errors import BadSpec, setting
from loaders.specs import RowOrder
from loaders.words import model_type_said

# transformers' modules within a layer that most architectures have
MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
    "self_attn.k_norm", "input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# A model saved without its head, as sentence encoders are, has names without `model.`.
HF_LAYER = re.compile(r"^(?:(?:model|backbone|encoder)\.)?layers?\.(\d+)\.(.+)\.(weight|bias)$")
# Vectors that the converter calls a bias, and that llama.cpp loads for every architecture that has them in its table.
NO_BIASES = ("e_score_correction.bias", "expert_bias.bias", "router_bias.bias")
QUERIES, KEYS = ("self_attn.q_proj", "mixer.q_proj"), ("self_attn.k_proj", "mixer.k_proj")
EXPERT = re.compile(r"\.experts\.(\d+)(?=\.)")
GGUF_LAYER = re.compile(r"^blk\.(\d+)\.(.+)\.(weight|bias)$")


GGUF_ARCHITECTURE = "gguf_architecture"  # a GGUF's architecture, where facts stand for a config.json
# The tensors of towers for images and sound, as TextModel.filter_tensors in conversion/base.py knows them.
TOWERS = (
    r"^(?:mlp|vit\.|vpm\.|siglip2\.|conformer\.|merger\.|resampler\.|sound_(?:encoder|projection)\.|speech_embeddings\.)"
    r"|visual\.|(?:vision|audio)[._]|talker\.|token2wav\.|code2wav\.|projector\.|pre_mm_projector_norm|image_newline"
    r"|view_seperator|patch_embed|patch_merge(?:r|_mlp)\.|model\.connector\."
)
PARTS = (
    "text_config",
    "vision_config",
    "audio_config",
    "thinker_config",
)  # what config.json has of a model with towers
NO_TOWERS = "llama.cpp keeps the towers of a model in a file of their own (mmproj), which is not made here"


@dataclass(frozen=True, slots=True)
class GgufName:
    """The place of transformers' tensor in a GGUF.

    expert: its number in a stack of experts. part, parts: which of how many tensors, whose rows follow each other.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The way in which llama.cpp holds a model_type: the `gguf` section of its family's file.

    architecture: llama.cpp's name of it.
    classes: transformers' class for config.json by model_type, where a GGUF of it is read; empty where it is not.
    modules: further modules within a layer that are read from a GGUF, with {} for an expert's number; see MODULES.
    renames: [pattern, replacement] rows that are applied to names before they are looked up; {next} in a replacement is
    the number of the layer for multi-token prediction, the first or, by a group called next, another one. A name that
    begins with blk. is a GGUF's own.
    joins: [pattern, replacement, part, parts] rows for tensors whose rows follow each other in one of a GGUF's.
    forms: tensors that are held in another shape, or with other values; see `loaders.architectures.forms`.
    drop: patterns for published names of what is left out, each with the reason.
    permutes: rows of q and k are in another order: llama.cpp's rotary embedding pairs neighbours, transformers' pairs
    the halves of a head (`permute` in conversion/llama.py).
    has_factors: llama.cpp loads the tensor rope_freqs.weight.
    biases: the modules, of a layer or beside the layers, whose biases it loads, with {} for an expert's number; those
    of q, k and v where nothing is said.
    float32: a pattern for GGUF's names of further tensors that are float32 whatever is asked for the others.
    as_stored: one for those that are not, though other architectures' are.
    defaults: what transformers' class takes for keys that a config.json leaves out.
    extras: words for tensors that follow from config.json; see `loaders.layouts.gguf.extra_tensors`.
    layers: the number of the layers of the model at hand, without those for multi-token prediction.
    keys: its keys of metadata: [type, key of config.json or several parted by |, default] or [type, number]; types are
    uint32, float32, bool, flag and text; null for a key that it has not.
    made: words for keys that follow from several of config.json's: functions of the files of
    `loaders.layouts.gguf.keys`.
    checks: words for what llama.cpp takes for granted: functions of `checks` there, which refuse a model that is
    computed otherwise.
    activations: the values that it computes of hidden_act, or of the key that `activation` names.
    requires: [key, value, reason] rows of what config.json must say where it says anything.
    ignored: keys of config.json that neither transformers nor llama.cpp reads for it, though they change other models.
    own_rope: words make the keys of rotary embeddings, which differ from layer to layer.
    rounds_ramp: yarn's ramp is computed with a rounded range, whatever config.json says; a warning tells so.
    next_tokens: it has layers for multi-token prediction, after the others.
    variants: what differs for some models of a type, under a word of `loaders.architectures.layer_kinds`; a later one
    that holds goes before.
    ropes: the kinds of rotary embeddings that it computes beside those of all: mrope (by sections), sliding (another
    base in layers with a window), longrope, proportional, dynamic.
    """

    architecture: str
    classes: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    joins: tuple[tuple[str, str, int, int], ...] = ()
    forms: tuple[Form, ...] = ()
    drop: tuple[tuple[str, str], ...] = ()
    permutes: bool = False
    has_factors: bool = False
    biases: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    keys: Mapping[str, Any] = field(default_factory=dict)
    made: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu", "swish")
    activation: str = "hidden_act"
    requires: tuple[tuple[str, Any, str], ...] = ()
    ignored: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ()
    float32: str = ""
    as_stored: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    own_rope: bool = False
    rounds_ramp: bool = False
    next_tokens: bool = False
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: int = 0

    @property
    def name(self) -> str:
        return self.architecture

    def gguf_name(self, name: str) -> GgufName | None:
        """Return where transformers' tensor is in a GGUF, or None if the architecture has no such tensor."""
        name = _published(name)
        for pattern, replacement in self.renames:
            name = re.sub(pattern, partial(self._renamed, replacement), name)
        if name.startswith("blk."):
            return GgufName(name)
        if name.endswith(".bias") and not name.endswith(NO_BIASES):
            match = HF_LAYER.match(name)
            module = name.removeprefix("model.").removesuffix(".bias") if match is None else match[2]
            if EXPERT.sub(".experts.{}", module) not in self.biases:
                return None
        expert = EXPERT.search(name)
        number = None if expert is None else int(expert[1])
        name, part, parts = self._joined(EXPERT.sub(".experts", name))
        found = gguf_names.gguf_name(self.architecture, name)
        return None if found is None else GgufName(found, number, part, parts)

    def _renamed(self, replacement: str, match: re.Match[str]) -> str:
        number = self.layers + int(match.groupdict().get("next") or 0)
        return match.expand(replacement).replace("{next}", str(number))

    def _joined(self, name: str) -> tuple[str, int, int]:
        """Return the name of the tensor that this one is a part of, and which part of how many."""
        for pattern, replacement, part, parts in self.joins:
            if re.search(pattern, name):
                return re.sub(pattern, replacement, name), part, parts
        return name, 0, 1

    def is_float32(self, name: str, dimensions: int) -> bool:
        """Whether a GGUF's tensor is float32 whatever is asked for the others."""
        if self.as_stored and re.search(self.as_stored, name):
            return False
        return is_float32(name, dimensions) or bool(self.float32 and re.search(self.float32, name))

    def is_quantized(self, name: str, shape: Shape) -> bool:
        """Whether llama.cpp quantizes a GGUF's tensor of this whole shape at all."""
        return is_quantized(self.architecture, name, shape)

    def dropped(self, config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Return [pattern, reason] rows for published names of what is left out."""
        is_multimodal = any(key in config for key in PARTS)
        return (*self.drop, (TOWERS, NO_TOWERS)) if is_multimodal else self.drop

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
            name = gguf_names.gguf_name(self.architecture, f"model.layers.0.{module.replace('.{}', '')}.weight")
            if name is not None:
                found[name.removeprefix("blk.0.").removesuffix(".weight")] = module
        return found

    def row_order(self, name: str, rows: int, config: Mapping[str, Any], *, inverse: bool) -> RowOrder | None:
        """Return the order in which GGUF takes the rows of transformers' tensor `name`; with `inverse`, the way back.

        Raises:
            BadSpec: the rows do not divide into heads.
        """
        match = HF_LAYER.match(_published(name))
        if not self.permutes or match is None or match[2] not in QUERIES + KEYS:
            return None
        heads = number(config, "num_attention_heads")
        if match[2] in KEYS:
            heads = number(config, "num_key_value_heads", heads)
        if heads < 1 or rows % (2 * heads):
            raise BadSpec(f"{name}: its {rows} rows do not divide into {heads} heads of an even size")
        return RowOrder(rows // heads, inverse)


def _published(name: str) -> str:
    """Return a tensor's name as that of a language model by itself, as the converter does before it looks names up."""
    name = name.replace("e_score_correction_bias", "e_score_correction.bias").replace("language_model.", "")
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


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
    if isinstance(name := config.get(GGUF_ARCHITECTURE), str):
        return Architecture(architecture=name)
    model_type = config.get("model_type")
    found = _architecture(model_type)
    if found is None:
        raise BadSpec(
            f"{setting('layout')}: gguf knows no architecture for {model_type_said(config)};"
            f" {others_known('gguf', config)}"
        )
    for condition, changes in found.variants.items():
        if CONDITIONS[condition](config):
            found = _made(added(section(model_type, "gguf") or {}, changes))
    return replace(found, layers=layer_count(config) or 0)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether `architecture_of` knows what a config is of."""
    return isinstance(config.get(GGUF_ARCHITECTURE), str) or _architecture(config.get("model_type")) is not None


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config.json with what transformers' class takes for the keys that it leaves out."""
    found = architecture_of(config).defaults
    return {**config, **{key: value for key, value in found.items() if text_config(config, key) is None}}


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
