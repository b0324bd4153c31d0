"""llama.cpp's mixes: the type of each tensor when a whole model is quantized to, say, Q4_K_M.

A mix is a function over the whole list of tensors. It decides as llama-quantize does: by a tensor's part in the model,
its layer, the number of experts, the blocks that divide its rows, and whether there is an importance matrix.

Source: llama.cpp 0.5 (as in llama-cpp-python 0.3.36), src/llama-quant.cpp: llama_tensor_get_type and what it calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loaders.architectures.family import natural_key
from loaders.architectures.gguf import (
    GGUF_ARCHITECTURE,
    Architecture,
    GgufName,
    architecture_of,
    completed,
    experts_of,
    number,
)
from loaders.dtypes import DTYPES, WEIGHT_DTYPES, Shape
from loaders.quantization.schemes.bitnet import Ternary
from loaders.quantization.schemes.ggml import FLOATS, Ggml
from loaders.rules.rule import Decision, Rule
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.repacked import holds_mxfp4

# mix (llama.cpp: file type) -> the type of most of its tensors
MIXES = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0",
    "Q5_1": "Q5_1", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "TQ1_0": "TQ1_0",
    "TQ2_0": "TQ2_0", "MXFP4_MOE": "MXFP4", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
}  # fmt: skip
# type -> the type instead where its blocks do not divide rows; float16 where those of the second do not either
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
            "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}  # fmt: skip
TERNARY = ("TQ1_0", "TQ2_0")
# mix -> the type of its first ffn_down with an importance matrix, and without one
BY_MATRIX = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
WITHOUT_MATRIX = {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
# A tensor's part in the model by its name; the first that matches counts.
PARTS = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        ("output", r"^output\.weight$"),
        ("token_embd", r"^(?:per_layer_)?token_embd\.weight$"),
        ("attn_qkv", r"attn_qkv\.weight"),
        ("attn_kv_b", r"attn_kv_b\.weight"),
        ("attn_v", r"attn_v\.weight"),
        ("attn_k", r"attn_k\.weight"),
        ("attn_q", r"attn_q\.weight"),
        ("attn_output", r"attn_output\.weight"),
        ("ffn_up", "ffn_up"),
        ("ffn_gate", "ffn_gate"),
        ("ffn_down", "ffn_down"),
    )
)
VALUES = ("attn_v", "attn_qkv", "attn_kv_b")  # parts that are taken for values of attention
GLM5_NEXT = re.compile(r"attn_q_[ab]|nextn\.eh_proj")  # what is quantized to no fewer than 8 bits there
BITNET = "BitNet's packed ternary"  # no type of ggml's: two bits a weight, one scale a tensor
NOT_DIVIDED = "its rows do not divide"
# What stays as it is where nothing but names tells of a model.
KEPT_ROLES = ("norm", "router", "bias", "buffer", "conv", "conv1d", "other")
LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlMix:
    """A file type of llama.cpp.

    pure: every matrix gets the mix's main type, except where its blocks do not divide rows (llama-quantize --pure).
    embedding, output: types for the embedding and the output projection (--token-embedding-type, --output-tensor-type);
    a tied embedding without one takes that of the output projection. absmean: ternary types round as BitNet does.
    has_imatrix: an importance matrix is used, whatever it holds.
    """

    name: str
    pure: bool = False
    embedding: str | None = None
    output: str | None = None
    absmean: bool = False
    has_imatrix: bool = False

    def rules(self, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]) -> tuple[Rule, ...]:
        """Return rules for all tensors by name, one for each type and reason.

        Raises:
            BadSpec: the model's architecture is not known.
        """
        model = _Model.of(architecture_of(config), completed(config), tensors)
        return self._rules((tensor, self._chosen(tensor, model)) for tensor in tensors)

    def rules_by_role(self, tensors: Sequence[LogicalTensor]) -> tuple[Rule, ...]:
        """Return rules for tensors of a model that llama.cpp does not know, or that nothing tells about.

        Matrices get the mix's main type, embedding and output projection the types that were asked for, else those of
        the mix: what a tensor is, its name has to tell. No engine reads the result, so that ternary weights whose rows
        blocks do not divide are packed as BitNet's own, which divides none.
        """
        return self._rules((tensor, self._chosen_by_role(tensor)) for tensor in tensors)

    def _rules(self, chosen: Iterable[tuple[LogicalTensor, tuple[str, str]]]) -> tuple[Rule, ...]:
        by_type: dict[tuple[str, str], set[str]] = {}
        for tensor, (kind, why) in chosen:
            is_there = tensor.dtype.name == kind
            found = ("keep", "it is of its type already") if is_there else (kind, why)
            by_type.setdefault(found, set()).add(tensor.name)
        return tuple(self._rule(kind, why, frozenset(found)) for (kind, why), found in sorted(by_type.items()))

    def _rule(self, chosen: str, why: str, names: frozenset[str]) -> Rule:
        if chosen == "keep":
            return Rule(action="keep", why=why, names=names)
        if chosen in FLOATS:
            return Rule(action="cast", why=why, names=names, cast_to=chosen)
        scheme = Ternary() if chosen == BITNET else Ggml(chosen, self.absmean and chosen in TERNARY)
        return Rule(action="quantize", why=f"{why}: {chosen}", names=names, scheme=scheme)

    def _chosen(self, tensor: LogicalTensor, model: _Model) -> tuple[str, str]:
        """Return a tensor's type, or "keep", and the reason for it."""
        default, found = MIXES[self.name], model.found.get(tensor.name)
        if found is None:
            return "keep", "llama.cpp has no place for it"
        if tensor.dtype.block == 1 and tensor.dtype.name not in WEIGHT_DTYPES:
            return "keep", "numbers that are no weights"
        if default in (*FLOATS, "MXFP4") and holds_mxfp4(tensor):
            return "MXFP4", "the source's own blocks, as llama.cpp's converter has them"
        if default in FLOATS and not model.architecture.is_float32(found.name, len(found.shape)):
            return default, f"llama.cpp's {self.name}"
        if default in FLOATS or not model.architecture.is_quantized(found.name, found.shape):
            return "keep", "llama.cpp keeps vectors, norms and routers"
        asked = self._asked(found, model)
        return self._fitting(asked or (default if self.pure else self._type(found, model)), tensor)

    def _type(self, tensor: _Tensor, model: _Model) -> str:
        """Return the type of a tensor by its part in the model; of some it depends on whether a matrix is there."""
        guarded = BY_MATRIX if self.has_imatrix else WITHOUT_MATRIX
        is_first = tensor.part == "ffn_down" and model.layer_of(tensor) < model.layers // 8
        if is_first and self.name in guarded:
            return guarded[self.name]
        return _type(self.name, MIXES[self.name], tensor, model)

    def _chosen_by_role(self, tensor: LogicalTensor) -> tuple[str, str]:
        default = MIXES[self.name]
        if tensor.dtype.name not in WEIGHT_DTYPES or tensor.role in KEPT_ROLES or len(tensor.shape) < 2:
            return "keep", "no matrix of a layer, or numbers that are no weights"
        if default in FLOATS:
            return default, f"llama.cpp's {self.name}"
        ends = {
            "embedding": self.embedding or ("Q4_K" if default in TERNARY else default),
            "head": self.output or ("Q8_0" if default == "Q8_0" else "Q6_K"),
        }
        chosen, why = self._fitting(default if self.pure else ends.get(tensor.role, default), tensor)
        if self.absmean and NOT_DIVIDED in why and tensor.role not in ends and not Ternary().refuses(tensor.spec):
            return BITNET, why
        return chosen, why

    def _fitting(self, chosen: str, tensor: LogicalTensor) -> tuple[str, str]:
        """Return a type, or what stands for it where its blocks do not divide the tensor's rows, and the reason."""
        fitting = fallback(chosen, tensor.shape[-1])
        if fitting != chosen:
            return fitting, f"{NOT_DIVIDED} into {chosen}'s blocks of {DTYPES[chosen].block}"
        return chosen, f"llama.cpp's {self.name}"

    def _asked(self, tensor: _Tensor, model: _Model) -> str | None:
        """Return the type that the user asked for, if this is an embedding or the output projection."""
        if tensor.part == "token_embd":
            return self.embedding or (self.output if model.is_tied else None)
        return self.output if tensor.part == "output" else None


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor by its name in a GGUF, and the shape of the whole, of a stack with its experts."""

    name: str
    shape: Shape

    @property
    def part(self) -> str:
        """Its part in the model: tensor_get_category."""
        return next((part for part, pattern in PARTS if pattern.search(self.name)), "")


@dataclass(frozen=True)
class _Model:
    """The facts about a model by which types are chosen. `found` are its tensors by their published names."""

    architecture: Architecture
    config: Mapping[str, Any]
    found: Mapping[str, _Tensor]

    @classmethod
    def of(cls, architecture: Architecture, config: Mapping[str, Any], tensors: Sequence[LogicalTensor]) -> _Model:
        dropped = [re.compile(pattern) for pattern, _ in architecture.dropped(config)]
        experts, found = experts_of(config), {}
        is_gguf = GGUF_ARCHITECTURE in config
        for tensor in tensors:
            place = GgufName(tensor.name) if is_gguf else architecture.gguf_name(tensor.name)
            if any(pattern.search(tensor.name) for pattern in dropped):
                continue
            if place is not None:
                shape = tensor.shape if place.expert is None else (experts, *tensor.shape)
                found[tensor.name] = _Tensor(place.name, shape)
            elif architecture.hf_name(tensor.name) is not None:  # a GGUF's own name
                found[tensor.name] = _Tensor(tensor.name, tensor.shape)
        return cls(architecture, config, found)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.found.values())

    @property
    def is_tied(self) -> bool:
        return "output.weight" not in self.names

    @cached_property
    def layers(self) -> int:
        """The number of layers, with those for multi-token prediction."""
        return max((int(layer[1]) + 1 for name in self.names if (layer := LAYER.match(name))), default=0)

    @cached_property
    def experts(self) -> int:
        return experts_of(self.config)

    @cached_property
    def queries_per_key(self) -> int:
        """How many heads of queries share one of keys in the first layer; 0 where it has no attention."""
        heads = number(self.config, "num_attention_heads", 0)
        if "blk.0.attn_kv_a_mqa.weight" in self.names:  # latent attention has one head of keys
            return heads
        if not any(name.startswith("blk.0.attn_k") or name == "blk.0.attn_qkv.weight" for name in self.names):
            return 0
        return heads // max(1, number(self.config, "num_key_value_heads", heads))

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp would take it for a 70B: by its 80 layers, and unlike a 65B by fewer keys than queries."""
        is_llama = self.architecture.name == "llama" and self.queries_per_key != 1
        return self.layers == 80 and (is_llama or self.architecture.name in ("qwen2", "deci", "olmo"))

    @cached_property
    def _ranks(self) -> Mapping[str, list[str]]:
        """The quantized tensors of each part, in the order of layers."""
        ranks: dict[str, set[str]] = {}
        for tensor in self.found.values():
            if self.architecture.is_quantized(tensor.name, tensor.shape):
                ranks.setdefault(tensor.part, set()).add(tensor.name)
        return {part: sorted(names, key=natural_key) for part, names in ranks.items()}

    def value_rank(self, tensor: _Tensor) -> tuple[int, int]:
        """Return which of the model's tensors with values of attention this is, and how many there are."""
        names = sorted((name for part in VALUES for name in self._ranks.get(part, ())), key=natural_key)
        return names.index(tensor.name), len(names)

    def layer_of(self, tensor: _Tensor) -> int:
        """Return the layer by which llama.cpp chooses: it counts the tensors of a dense model, which may be wrong."""
        layer = LAYER.match(tensor.name)
        if self.experts > 1 and layer is not None:
            return int(layer[1])
        return self._ranks[tensor.part].index(tensor.name)


def fallback(chosen: str, columns: int) -> str:
    """Return the chosen type, or what llama.cpp takes instead where its blocks do not divide rows of `columns`."""
    if columns % DTYPES[chosen].block == 0:
        return chosen
    second = FALLBACK.get(chosen, chosen)
    return second if columns % DTYPES[second].block == 0 else "F16"


def fallback_notes(decisions: Iterable[Decision]) -> list[str]:
    """Return a sentence for each type that stands for another whose blocks do not divide rows."""
    found: dict[str, list[str]] = {}
    for decision in decisions:
        if decision.rule.why.startswith(NOT_DIVIDED):
            found.setdefault(decision.rule.why, []).append(decision.tensor.name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}:"
        f" {why.replace('its rows', 'rows', 1).replace(': ', '; stored as ')}"
        for why, names in found.items()
    ]


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _type(mix: str, default: str, tensor: _Tensor, model: _Model) -> str:
    """Return the type of a tensor by its part in the model: llama_tensor_get_type."""
    name, part = tensor.name, tensor.part
    if model.architecture.name == "glm5-next" and GLM5_NEXT.search(name):
        return "Q8_0"
    if part == "output" or (part == "token_embd" and model.is_tied):
        if mix == "MXFP4_MOE" or model.architecture.name == "falcon" or tensor.shape[-1] % DTYPES[default].block:
            return "Q8_0"
        return default if default == "Q8_0" else "Q6_K"
    if mix == "MXFP4_MOE":
        is_stack = len(tensor.shape) == 3 and tensor.shape[0] > 1
        is_chosen = model.architecture.name != "bailingmoe3" or part.startswith("ffn_")
        return "MXFP4" if is_stack and is_chosen else "Q8_0"
    if part == "token_embd":
        return "Q4_K" if default in TERNARY else default
    if part in VALUES:
        return _value_type(mix, default, model, *model.value_rank(tensor))
    if part == "attn_k" and model.experts == 8:
        return "Q8_0"
    is_falcon = model.architecture.name == "falcon"
    if part == "ffn_down":
        down = _falcon_down_type if is_falcon else _down_type
        return down(mix, default, model.layer_of(tensor), model.layers)
    if part == "attn_output":
        return {"Q3_K_L": "Q4_K"}.get(mix, default) if is_falcon else _output_type(mix, default, model.experts)
    return default


def _value_type(mix: str, default: str, model: _Model, rank: int, count: int) -> str:
    chosen = default
    if mix == "Q2_K":
        chosen = "Q4_K" if model.queries_per_key >= 4 else "Q3_K"
    elif mix == "Q2_K_S":
        chosen = "Q4_K" if model.queries_per_key >= 4 else default
    elif mix in ("IQ4_NL", "IQ4_XS"):
        chosen = "Q5_K" if model.queries_per_key >= 4 else default
    elif mix == "Q3_K_M":
        chosen = "Q5_K" if rank < 2 else "Q4_K"
    elif mix == "Q3_K_L" or (mix == "Q4_K_S" and rank < 4):
        chosen = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(rank, count):
        chosen = "Q6_K"
    if model.is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if model.experts == 8 else chosen


def _down_type(mix: str, default: str, layer: int, layers: int) -> str:
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q2_K_S":
        return "Q4_K" if layer < layers // 8 else default
    if mix == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if mix == "Q3_K_L" or (mix == "Q4_K_S" and layer < layers // 8):
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, layers):
        return "Q6_K"
    return default


def _falcon_down_type(mix: str, default: str, layer: int, layers: int) -> str:
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q2_K_S":
        return "Q4_K" if layer < layers // 8 else default
    is_first = layer < layers // 16
    if mix == "Q3_K_M":
        return "Q5_K" if is_first else "Q4_K" if _more_bits(layer, layers) else "Q3_K"
    if mix == "Q3_K_L":
        return "Q4_K"
    if mix == "Q4_K_M":
        return "Q6_K" if is_first else "Q5_K" if _more_bits(layer, layers) else "Q4_K"
    return "Q6_K" if mix == "Q5_K_M" and _more_bits(layer, layers) else default


def _output_type(mix: str, default: str, experts: int) -> str:
    if experts == 8:
        return "Q5_K" if mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS") else default
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, default)
