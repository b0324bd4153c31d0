"""Stored tensors that hold all experts of a layer: what they are called, and how they are cut into single experts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from loaders.dtypes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A stored tensor that holds all experts of a layer, and how to cut it into the experts' tensors.

    `name` is the pattern for an expert's tensor: it is expanded with the match's groups, then with {expert} and {part}.
    `parts` share the dimension of outputs, one after another, or in turn if interleaved. Matrices are (experts,
    outputs, inputs), or (experts, inputs, outputs) if transposed; biases are (experts, outputs). Where `is_transposed`
    is None, the shape tells, in which one side is the model's `hidden` size; where both are, the layer's other stack,
    or else `square_is_transposed`. With `only_vllm`, transformers has no place for the experts one by one, and reads
    the stack alone.
    """

    pattern: re.Pattern[str]
    name: str
    parts: tuple[str, ...]
    is_transposed: bool | None
    is_interleaved: bool = False
    is_bias: bool = False
    only_vllm: bool = False
    hidden: int | None = None
    hidden_is_output: bool = False
    square_is_transposed: bool | None = None

    def transposed(self, shape: Shape) -> bool | None:
        """Whether a stack of this shape is transposed; None if its shape does not tell."""
        if self.is_transposed is not None or len(shape) != 3:
            return self.is_transposed
        is_hidden = shape[1] == self.hidden, shape[2] == self.hidden
        if is_hidden[0] == is_hidden[1]:
            return None
        return is_hidden[1] if self.hidden_is_output else is_hidden[0]


GPT_OSS_STACK = r"^(?P<experts>(?:.*\.)?mlp\.experts)\."
GPT_OSS_STACKS = (
    Stack(
        pattern=re.compile(GPT_OSS_STACK + "gate_up_proj$"), name=r"\g<experts>.{expert}.{part}_proj.weight",
        parts=("gate", "up"), is_transposed=True, is_interleaved=True,
    ),
    Stack(
        pattern=re.compile(GPT_OSS_STACK + "down_proj$"), name=r"\g<experts>.{expert}.{part}_proj.weight",
        parts=("down",), is_transposed=True,
    ),
    Stack(
        pattern=re.compile(GPT_OSS_STACK + "gate_up_proj_bias$"), name=r"\g<experts>.{expert}.{part}_proj.bias",
        parts=("gate", "up"), is_transposed=True, is_interleaved=True, is_bias=True,
    ),
    Stack(
        pattern=re.compile(GPT_OSS_STACK + "down_proj_bias$"), name=r"\g<experts>.{expert}.{part}_proj.bias",
        parts=("down",), is_transposed=True, is_bias=True,
    ),
)  # fmt: skip
LLAMA4_STACKS = tuple(
    Stack(
        pattern=re.compile(rf"^(?P<experts>(?:.*\.)?feed_forward\.experts)\.{stored}$"),
        name=r"\g<experts>.{expert}.{part}_proj.weight", parts=parts, is_transposed=True,
    )
    for stored, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",)))
)  # fmt: skip

# Stacks of other names, whose experts llm-compressor names one by one, and vLLM reads so since September 2026: its
# GraniteMoeModel and RoutedExperts.load_weights, GraniteMoeHybridModel.get_expert_mapping, Step3p5Model.load_weights.
# By model type: the rest of a stack's name, and its parts.
GRANITE_STACKS = (
    (r"block_sparse_moe)\.input_linear", ("gate", "up")),
    (r"block_sparse_moe)\.output_linear", ("down",)),
)
STEP_STACKS = tuple((rf"moe)\.{part}_proj", (part,)) for part in ("gate", "up", "down"))
OTHER_STACKS = {
    "granitemoe": GRANITE_STACKS, "granitemoeshared": GRANITE_STACKS, "granitemoehybrid": GRANITE_STACKS,
    "step3p5": STEP_STACKS, "step3p7": STEP_STACKS,
}  # fmt: skip
# Whether the published stacks of a model type are transposed, for those whose shape does not tell it.
TRANSPOSED = {
    "qwen3_5_moe": False, "qwen3_5_moe_text": False, "gemma4": False, "gemma4_text": False, "qwen3_vl_moe": True,
    "mistral4": False,
}  # fmt: skip
# Types whose experts transformers reads in stacks, and not one by one.
ONLY_STACKED = ("gemma4", "gemma4_text", "qwen3_vl_moe", "granitemoe", "granitemoehybrid", "mistral4")


def generic_stacks(model_type: Any, hidden: Any) -> tuple[Stack, ...]:
    """Return the stacks of experts that transformers 5 makes, named as in most of its models, and those of this type.

    `hidden` is the model's size between layers, if config.json says it.
    """
    others = OTHER_STACKS.get(str(model_type), ())
    return tuple(
        Stack(
            pattern=re.compile(rf"^(?P<experts>(?:.*\.)?{stored}\.weight$"),
            name=r"\g<experts>.experts.{expert}.{part}_proj.weight", parts=parts, is_transposed=False, only_vllm=True,
        )
        for stored, parts in others
    ) + tuple(
        Stack(
            pattern=re.compile(rf"^(?P<experts>(?:.*\.)?experts)\.{stored}(?:\.weight)?$"),
            name=r"\g<experts>.{expert}.{part}_proj.weight", parts=parts, is_transposed=None,
            hidden=hidden if isinstance(hidden, int) else None, hidden_is_output=is_output,
            square_is_transposed=TRANSPOSED.get(str(model_type)),
        )
        for stored, parts, is_output in (("gate_up_proj", ("gate", "up"), False), ("down_proj", ("down",), True))
    )  # fmt: skip
