"""mlx-lm's models: the names of their tensors and their settings, where they differ from transformers'.

The facts are in the `mlx` sections of the family files, from mlx_lm 0.32, models/*.py (ModelArgs, sanitize and
quant_predicate). mlx-lm stacks experts, so that an expert's matrix is one of E along the first dimension of
MODULE.switch_mlp.gate_proj and its like.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from loaders.architectures.family_files import section
from loaders.architectures.forms import Form, forms_of
from loaders.architectures.mlx_layers import Place, places_of
from loaders.dtypes import DTYPES, DType
from loaders.limits import check_tensors

CAST_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A layer's experts. `module` holds them, or the layer itself if it is empty.

    matrices: published names by mlx-lm's.
    count: mlx-lm's key for their number in config.json. stack: mlx-lm's name of the module that stacks them.
    """

    module: str
    count: str
    stack: str = "switch_mlp"
    matrices: Mapping[str, str] = field(
        default_factory=lambda: {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
    )

    @property
    def inside(self) -> str:
        """The module's name inside a layer, as a part of a pattern."""
        return re.escape(f".{self.module}") if self.module else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxModel:
    """The way in which mlx-lm treats a model_type: the `mlx` section of its family's file.

    names: beginnings of published names, and what mlx-lm has in their place; the first that fits counts.
    inside: parts of published names, wherever they stand, and what mlx-lm has in their place; each counts.
    forms: tensors that mlx-lm holds in another shape, or with other values; see `loaders.architectures.forms`.
    drop, keep: patterns for published names of what mlx-lm leaves out, or has as no linear layer, each with the reason.
    experts: a layer's experts, where they are.
    shared_keys: the setting that says of how many last layers mlx-lm drops keys and values, which earlier ones give.
    head_dim: whether mlx-lm can be told a head_dim other than hidden_size / num_attention_heads.
    fine: patterns for published names of weights that mlx-lm always gives FINE_BITS in groups of FINE_GROUP, each with
    the reason.
    uncast: patterns for published names of what mlx_lm.convert does not cast to torch_dtype.
    defaults: settings for which mlx-lm has no default, with the values that transformers takes if they are missing.
    takes: settings that mlx-lm does not read, with the values of which it computes one and the same thing. The
    activation is SILU's where nothing is said.
    places: lists in config.json of what each layer is, where mlx-lm works it out; see `mlx_layers`.
    scalings: the rope scalings that it computes where it does not leave them to mlx-lm's initialize_rope.
    apart: whether its rotary embeddings are others than transformers' usual ones, in both libraries.
    own_rope: whether mlx-lm reads rope_parameters, and nothing of it from another place.
    words: what mlx-lm calls the entries of a setting's list, by what transformers 5 calls them.
    head: the output projection is there or tied as the config says ("either"), must be there ("own"), or must not
    ("tied").
    nested: whether the language model's settings are in text_config.
    """

    names: tuple[tuple[str, str], ...] = ()
    inside: tuple[tuple[str, str], ...] = ()
    forms: tuple[Form, ...] = ()
    drop: tuple[tuple[str, str], ...] = ()
    keep: tuple[tuple[str, str], ...] = ()
    experts: Experts | None = None
    shared_keys: str = ""
    head_dim: bool = False
    fine: tuple[tuple[str, str], ...] = ()
    uncast: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    takes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    scalings: tuple[str, ...] | None = None
    apart: bool = False
    own_rope: bool = False
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    head: str = "either"
    nested: bool = False


SILU = ("silu", "swish")
# the affine groups that mlx-lm's models ask for where they set those of a module
FINE_BITS = 8
FINE_GROUP = 64
LAYER = r"(?:.*\.)?layers\.\d+"


def model_of(config: Mapping[str, Any]) -> MlxModel | None:
    """Return the model of a config's model_type, or None if it is unknown."""
    return _model(config.get("model_type"))


@cache
def _model(model_type: object) -> MlxModel | None:
    found = section(model_type, "mlx")
    if found is None:
        return None
    experts = found.get("experts")
    pairs = ("names", "inside", "drop", "keep", "fine")
    made: dict[str, Any] = {key: tuple(map(tuple, found.get(key, ()))) for key in pairs}
    made |= {"forms": forms_of(found.get("forms", ())), "experts": Experts(**experts) if experts else None}
    made |= {"uncast": tuple(found.get("uncast", ())), "places": places_of(found.get("places", ()))}
    made |= {"takes": {"hidden_act": SILU, **found.get("takes", {})}}
    made |= {"scalings": tuple(found["scalings"]) if "scalings" in found else None}
    return MlxModel(**{**found, **made})


def convert_dtype(config: Mapping[str, Any]) -> DType | None:
    """Return the dtype to which mlx_lm.convert casts all float weights first; None if each keeps its own.

    mlx_lm.convert reads `torch_dtype`, or the `dtype` of a text_config, but not the top `dtype` of transformers 5.
    """
    text = config.get("text_config")
    name = config.get("torch_dtype") or (text.get("dtype") if isinstance(text, Mapping) else None)
    return DTYPES[CAST_DTYPES[name]] if isinstance(name, str) and name in CAST_DTYPES else None


# --- names


def mlx_name(model: MlxModel, name: str) -> str:
    """Return mlx-lm's name of a tensor: a model saved without its head, as sentence encoders are, lacks `model.`."""
    for published, own in model.inside:
        name = name.replace(published, own)
    for published, own in model.names:
        if name.startswith(published):
            return own + name.removeprefix(published)
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def published_name(model: MlxModel, name: str) -> str:
    """Return the published name of mlx-lm's tensor."""
    for published, own in model.names:
        if name.startswith(own):
            name = published + name.removeprefix(own)
            break
    for published, own in model.inside:
        name = name.replace(own, published)
    return name


def stack_of(model: MlxModel, name: str) -> tuple[str, int] | None:
    """Return the stacked weight or bias of which an expert's tensor is a part, and the expert's number.

    `name` is the expert's, as `mlx_name` gives it.
    """
    if model.experts is None:
        return None
    own = {hf: mlx for mlx, hf in model.experts.matrices.items()}
    match = re.fullmatch(rf"({LAYER}{model.experts.inside})\.experts\.(\d+)\.({'|'.join(own)})\.(weight|bias)", name)
    return (f"{match[1]}.{model.experts.stack}.{own[match[3]]}.{match[4]}", int(match[2])) if match else None


def is_stack(model: MlxModel | None, name: str) -> bool:
    """Whether a stored tensor holds a layer's experts."""
    return model is not None and expert_names(model, name, 1) is not None


def expert_names(model: MlxModel, stacked: str, count: int) -> tuple[str, ...] | None:
    """Return the published names of the experts in a stacked weight or bias, in order; None if it is no stack."""
    # Most tensors are no experts' at all, which a look for a word tells sooner than a pattern.
    if model.experts is None or f".{model.experts.stack}." not in stacked:
        return None
    matrices = model.experts.matrices
    match = re.fullmatch(
        rf"({LAYER}{model.experts.inside})\.{model.experts.stack}\.({'|'.join(matrices)})\.(weight|bias)", stacked
    )
    if match is None:
        return None
    matrix = f"{matrices[match[2]]}.{match[3]}"
    check_tensors(count, f"the experts of {stacked}")
    return tuple(published_name(model, f"{match[1]}.experts.{expert}.{matrix}") for expert in range(count))


def is_piece(model: MlxModel, name: str) -> bool:
    """Whether a tensor is one of several that mlx-lm cuts a published one into, and no expert's."""
    return any(name.endswith(f".{to}") for form in model.forms if form.role != "expert" for to in form.to)


def keeps_published_tensors(model: MlxModel) -> bool:
    """Whether mlx-lm has a model's tensors as published, but for experts."""
    return not (model.names or model.inside or model.forms)


# --- the packed container's experts, whose matrices have mlx-lm's names


def packed_experts(config: Mapping[str, Any]) -> tuple[str, Mapping[str, str]]:
    """Return the module that holds experts, and transformers' names of their matrices by mlx-lm's.

    A model that is unknown gets the most common ones.
    """
    model = model_of(config)
    experts = Experts(module="mlp", count="") if model is None or model.experts is None else model.experts
    return experts.module, experts.matrices


def packed_expert_name(config: Mapping[str, Any], layer: int, expert: int, component: str) -> str:
    """Return transformers' name of a component of an expert, such as "gate_proj.weight"."""
    module, matrices = packed_experts(config)
    matrix, _, suffix = component.partition(".")
    inside = f"{module}." if module else ""
    return f"model.layers.{layer}.{inside}experts.{expert}.{matrices[matrix]}.{suffix}"


def packed_expert(config: Mapping[str, Any], name: str) -> tuple[int, int, str] | None:
    """Return the layer, expert and component that an expert's tensor is; None for any other tensor."""
    module, matrices = packed_experts(config)
    own = {hf: mlx for mlx, hf in matrices.items()}
    match = re.fullmatch(
        rf"model\.layers\.(\d+)\.{re.escape(module)}\.?experts\.(\d+)\.({'|'.join(own)})\.(weight|scales|biases)", name
    )
    return (int(match[1]), int(match[2]), f"{own[match[3]]}.{match[4]}") if match else None
