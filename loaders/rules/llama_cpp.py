"""llama.cpp's mixes: the type of each tensor when a whole model is quantized to, say, Q4_K_M.

A mix is a function over the whole list of tensors. It decides as llama-quantize does without an importance matrix: by a
tensor's part in the model, its layer, the number of experts, and the blocks that divide its rows.

Source: llama.cpp 0.5 (as in llama-cpp-python 0.3.36), src/llama-quant.cpp: llama_tensor_get_type and what it calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.architectures.families import natural_key
from loaders.architectures.gguf import Architecture, architecture_of, experts_of, number
from loaders.dtypes import DTYPES
from loaders.quantization.schemes.ggml import FLOATS, Ggml
from loaders.rules.rule import Rule
from loaders.tensors.logical_tensor import LogicalTensor

# mix (llama.cpp: file type) -> the type of most of its tensors
MIXES = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0",
    "Q5_1": "Q5_1", "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "TQ1_0": "TQ1_0", "TQ2_0": "TQ2_0",
    "MXFP4_MOE": "MXFP4",
}  # fmt: skip
# type -> the type instead where its blocks do not divide rows; float16 where those of the second do not either
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
            "Q6_K": "Q8_0"}  # fmt: skip
TERNARY = ("TQ1_0", "TQ2_0")
PARTS = ("attn_v", "attn_k", "attn_q", "attn_output", "ffn_up", "ffn_gate", "ffn_down")
LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class GgmlMix:
    """A file type of llama.cpp.

    pure: every matrix gets the mix's main type, except where its blocks do not divide rows (llama-quantize --pure).
    embedding, output: types for the embedding and the output projection (--token-embedding-type, --output-tensor-type);
    a tied embedding takes that of the output projection. absmean: ternary types round as BitNet does.
    """

    name: str
    pure: bool = False
    embedding: str | None = None
    output: str | None = None
    absmean: bool = False

    def rules(self, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]) -> tuple[Rule, ...]:
        """Return rules for all tensors by name, one for each type and reason.

        Raises:
            BadSpec: the model's architecture is not known.
        """
        architecture = architecture_of(config)
        names = {tensor.name: _gguf_name(architecture, tensor.name) for tensor in tensors}
        model = _Model(architecture, config, set(names.values()))
        by_type: dict[tuple[str, str], set[str]] = {}
        for tensor in tensors:
            name = names[tensor.name]
            if not _is_quantized(tensor, name):
                chosen, why = "keep", "llama.cpp keeps vectors, norms and routers"
            else:
                chosen, why = self._type(tensor, name, model)
            if tensor.dtype.name == chosen:
                chosen, why = "keep", "it is of its type already"
            by_type.setdefault((chosen, why), set()).add(tensor.name)
        return tuple(self._rule(chosen, why, frozenset(found)) for (chosen, why), found in sorted(by_type.items()))

    def _rule(self, chosen: str, why: str, names: frozenset[str]) -> Rule:
        if chosen == "keep":
            return Rule(action="keep", why=why, names=names)
        if chosen in FLOATS:
            return Rule(action="cast", why=why, names=names, cast_to=chosen)
        scheme = Ggml(chosen, self.absmean and chosen in TERNARY)
        return Rule(action="quantize", why=f"{why}: {chosen}", names=names, scheme=scheme)

    def _asked(self, name: str, model: _Model) -> str | None:
        """Return the type that the user asked for, if this is the embedding or the output projection."""
        if name == "output.weight" or (name == "token_embd.weight" and model.is_tied):
            return self.output
        return self.embedding if name == "token_embd.weight" else None

    def _type(self, tensor: LogicalTensor, name: str, model: _Model) -> tuple[str, str]:
        """Return a matrix's type, and the reason for it."""
        default = MIXES[self.name]
        if default in FLOATS:
            return default, f"llama.cpp's {self.name}"
        asked = self._asked(name, model)
        chosen = asked or (default if self.pure else _chosen(self.name, default, tensor, name, model))
        fitting = fallback(chosen, tensor.shape[-1])
        if fitting != chosen:
            return fitting, f"its rows do not divide into {chosen}'s blocks of {DTYPES[chosen].block}"
        return chosen, f"llama.cpp's {self.name}"


@dataclass(frozen=True)
class _Model:
    """The facts about a model by which types are chosen."""

    architecture: Architecture
    config: Mapping[str, Any]
    names: set[str]

    @property
    def is_tied(self) -> bool:
        return "output.weight" not in self.names

    @property
    def layers(self) -> int:
        return self.architecture.layers

    @property
    def experts(self) -> int:
        return experts_of(self.config)

    @property
    def queries_per_key(self) -> int:
        heads = number(self.config, "num_attention_heads")
        return heads // max(1, number(self.config, "num_key_value_heads", heads))

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp would take it for a 70B: by its 80 layers, and unlike a 65B by fewer keys than queries."""
        is_llama = self.architecture.name == "llama" and self.queries_per_key != 1
        return self.layers == 80 and (is_llama or self.architecture.name == "qwen2")

    def rank(self, part: str, name: str) -> tuple[int, int]:
        """Return which of the model's tensors of this part it is, and how many there are."""
        mine = [n for n in self.names if f".{part}." in n and n.endswith(".weight")]
        return sorted(mine, key=natural_key).index(name), len(mine)


def _gguf_name(architecture: Architecture, name: str) -> str:
    found = architecture.gguf_name(name)
    return name if found is None else found.name


def _is_quantized(tensor: LogicalTensor, name: str) -> bool:
    is_matrix = len(tensor.shape) >= 2 and name.endswith("weight")
    return is_matrix and not name.endswith("_norm.weight") and "ffn_gate_inp." not in name


def fallback(chosen: str, columns: int) -> str:
    """Return the chosen type, or what llama.cpp takes instead where its blocks do not divide rows of `columns`."""
    if columns % DTYPES[chosen].block == 0:
        return chosen
    second = FALLBACK.get(chosen, chosen)
    return second if columns % DTYPES[second].block == 0 else "F16"


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _chosen(mix: str, default: str, tensor: LogicalTensor, name: str, model: _Model) -> str:
    """Return the type of a tensor by its part in the model: llama_tensor_get_type."""
    if name == "output.weight" or (name == "token_embd.weight" and model.is_tied):
        if mix == "MXFP4_MOE" or tensor.shape[-1] % DTYPES[default].block:
            return "Q8_0"
        return default if default == "Q8_0" else "Q6_K"
    if mix == "MXFP4_MOE":
        return "MXFP4" if "_exps." in name else "Q8_0"
    if name == "token_embd.weight":
        return "Q4_K" if default in TERNARY else default
    part = next((part for part in PARTS if f"{part}.weight" in name or f"{part}_exps." in name), "")
    if part == "attn_v":
        return _value_type(mix, default, model, *model.rank("attn_v", name))
    if part == "attn_k" and model.experts == 8:
        return "Q8_0"
    if part == "ffn_down":
        layer = LAYER.match(name)
        # llama.cpp counts the tensors of a dense model, and reads the layer's number from the name of a mixture's.
        rank = int(layer[1]) if model.experts > 1 and layer else _down_rank(model, name)
        return _down_type(mix, default, rank, model.layers)
    if part == "attn_output":
        return _output_type(mix, default, model.experts)
    return default


def _down_rank(model: _Model, name: str) -> int:
    return model.rank("ffn_down", name)[0]


def _value_type(mix: str, default: str, model: _Model, rank: int, count: int) -> str:
    chosen = default
    if mix == "Q2_K":
        chosen = "Q4_K" if model.queries_per_key >= 4 else "Q3_K"
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
    if mix == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if mix == "Q3_K_L" or (mix == "Q4_K_S" and layer < layers // 8):
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, layers):
        return "Q6_K"
    return default


def _output_type(mix: str, default: str, experts: int) -> str:
    if experts == 8:
        return "Q5_K" if mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else default
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, default)
