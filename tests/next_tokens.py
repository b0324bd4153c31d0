"""Layers for multi-token prediction as published checkpoints store them; transformers' classes have none of them.

The names are those of tests/headers (Qwen, DeepSeek, GLM), and of what engines load: vLLM's and llama.cpp's converter's
for Step, MiMo and ERNIE. A layer repeats the shapes of one of the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.header_checkpoints import Tensors

LAYER = re.compile(r"^(.*?\blayers\.)(\d+)\.(.+)$")


def layer_of(tensors: Tensors, number: int) -> Tensors:
    """Return the tensors of one of the text model's layers, by their names within it."""
    found = {name: LAYER.match(name) for name in tensors if not re.search("visual|vision", name)}
    return {match[3]: tensors[name] for name, match in found.items() if match and int(match[2]) == number}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def norms(hidden: int, *names: str) -> Tensors:
    return {f"{name}.weight": ("BF16", (hidden,)) for name in names}


def qwen(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    hidden, last = config["hidden_size"], config["num_hidden_layers"] - 1
    return under("mtp.", {
        **under("layers.0.", layer_of(tensors, last)), "fc.weight": ("BF16", (hidden, 2 * hidden)),
        **norms(hidden, "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"),
    })  # fmt: skip


def deepseek(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """One more layer after the others, which shares embedding and head with the model."""
    hidden, last = config["hidden_size"], config["num_hidden_layers"]
    return under(f"model.layers.{last}.", {
        **layer_of(tensors, last - 1), "eh_proj.weight": ("BF16", (hidden, 2 * hidden)),
        **norms(hidden, "enorm", "hnorm", "shared_head.norm"),
    })  # fmt: skip


def deepseek_whole(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The same with copies of embedding and head."""
    table, prefix = tensors["model.embed_tokens.weight"], f"model.layers.{config['num_hidden_layers']}."
    copies: Tensors = {"embed_tokens.weight": table, "shared_head.head.weight": table}
    return deepseek(tensors, config) | under(prefix, copies)


def deepseek_v4(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    hidden, last = config["hidden_size"], config["num_hidden_layers"] - 1
    square: Tensors = {f"{name}_proj.weight": ("BF16", (hidden, hidden)) for name in "eh"}
    heads: Tensors = {name: ("F32", shape) for name, (_, shape) in tensors.items() if name.startswith("hc_head")}
    return under("mtp.0.", {**layer_of(tensors, last), **square, **heads, **norms(hidden, "enorm", "hnorm", "norm")})


def _dense(tensors: Tensors, attention: int, mlp: int) -> Tensors:
    """Return a layer with the attention of one layer and the dense MLP of another."""
    one, other = layer_of(tensors, attention), layer_of(tensors, mlp)
    return {name: tensor for name, tensor in one.items() if not name.startswith(("mlp", "moe", "share_expert"))} | {
        name: tensor for name, tensor in other.items() if name.startswith("mlp")
    }


def step(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    hidden, last = config["hidden_size"], config["num_hidden_layers"]
    attention = config["layer_types"].index(config["layer_types"][last])
    layer = {
        **_dense(tensors, attention, 0), "eh_proj.weight": ("BF16", (hidden, 2 * hidden)),
        **norms(hidden, "enorm", "hnorm", "transformer.shared_head.norm"),
        "transformer.shared_head.output.weight": ("BF16", (config["vocab_size"], hidden)),
    }  # fmt: skip
    return {name: tensor for i in range(3) for name, tensor in under(f"model.layers.{last + i}.", layer).items()}


def mimo(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    hidden, sliding = config["hidden_size"], config["hybrid_layer_pattern"].index(1)
    layer = {
        **_dense(tensors, sliding, 0), "eh_proj.weight": ("BF16", (hidden, 2 * hidden)),
        **norms(hidden, "enorm", "hnorm", "final_layernorm"),
    }  # fmt: skip
    layer["pre_mlp_layernorm.weight"] = layer.pop("post_attention_layernorm.weight")
    return {name: tensor for i in range(3) for name, tensor in under(f"model.mtp.layers.{i}.", layer).items()}


def ernie(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    hidden = config["hidden_size"]
    return {
        **under("model.mtp_block.0.", layer_of(tensors, 0)), **norms(hidden, "model.mtp_emb_norm.0"),
        **norms(hidden, "model.mtp_hidden_norm.0"), "model.mtp_linear_proj.0.weight": ("BF16", (hidden, 2 * hidden)),
    }  # fmt: skip


FORMS: dict[str, Callable[[Tensors, dict[str, Any]], Tensors]] = {
    each.__name__: each for each in (qwen, deepseek, deepseek_whole, deepseek_v4, step, mimo, ernie)
}
