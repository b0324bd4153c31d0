"""The dtype of what is kept: that of a decoded source where nothing is asked for, and what it changes elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loaders.architectures.family import load_dtype
from loaders.dtypes import DTYPES, DType
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Decision, Rule
from loaders.tensors.encoding import Encoding

if TYPE_CHECKING:
    from loaders.checkpoints.checkpoint import Checkpoint

FLOATS = ("F32", "F16", "BF16", "F64")
OWN = ("sensitive", "buffer")  # roles of tensors whose dtype is the model's own affair


def usual_dtype(checkpoint: Checkpoint, scheme: Scheme, *, is_decoded: bool) -> DType | None:
    """Return the dtype to which what is kept is cast where none is asked for; None leaves all as it is stored.

    A GGUF that is decoded has no float dtype of its own: what it stores in blocks, and most norms, would be float32.
    They become bfloat16, or of the dtype of matrices in floats, if the output is for another engine than llama.cpp, all
    of which take it. A plain output of a GGUF that has no blocks stays as it is stored: nothing is decoded there.
    """
    if checkpoint.container != "gguf" or not is_decoded:
        return None
    has_blocks = any(weight.dtype.block > 1 for weight in checkpoint.weights)
    if isinstance(scheme, Plain) and (scheme.dtype is not None or not has_blocks):
        return None
    matrices = load_dtype(checkpoint.config)
    return DTYPES["BF16"] if matrices == DTYPES["F32"] else matrices


def declared_in(checkpoint: Checkpoint, dtype: DType | None) -> Checkpoint:
    """Return a checkpoint whose config says another dtype; its stored weights stay the same."""
    if dtype is None or not checkpoint.config:
        return checkpoint
    return replace(checkpoint, config=_declared(checkpoint.config, dtype))


def _declared(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    made = {**config, **dict.fromkeys(keys or ["dtype"], dtype.torch)}
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        made["text_config"] = {
            **inner,
            **{key: dtype.torch for key in ("dtype", "torch_dtype") if inner.get(key) is not None},
        }
    return made


def cast_kept(decisions: Sequence[Decision], dtype: DType | None) -> tuple[Decision, ...]:
    """Return decisions in which kept floats are cast to a dtype, but those that the model itself holds in float32."""
    if dtype is None:
        return tuple(decisions)
    rules: dict[Rule, Rule] = {}

    def cast(decision: Decision) -> Decision:
        tensor, rule = decision.tensor, decision.rule
        is_kept = decision.action == "keep" and tensor.dtype.name in FLOATS and tensor.role not in OWN
        if not is_kept or tensor.dtype == dtype:
            return decision
        if rule not in rules:
            rules[rule] = replace(rule, action="cast", cast_to=dtype.name, why=f"{rule.why}; in output.dtype")
        encoding = Encoding(tensor=tensor, action="cast", scheme=Plain(dtype.name))
        return Decision(tensor, rules[rule], encoding)

    return tuple(map(cast, decisions))
