"""The dtype of what is kept: `output.dtype`, and what it makes of a plan's config and decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.planning.targets import Target
from loaders.architectures.family import load_dtype
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DTYPES, DType
from loaders.errors import BadSpec
from loaders.layouts.diffusers import is_of_diffusers
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Decision, Rule
from loaders.tensors.encoding import Encoding

FLOATS = ("F32", "F16", "BF16", "F64")
OWN = ("sensitive", "buffer")  # roles of tensors whose dtype is the model's own affair


def kept_dtype(target: Target, checkpoint: Checkpoint, *, is_decoded: bool) -> DType | None:
    """Return the dtype to which what a target keeps is cast; None leaves all as it is stored.

    A GGUF that is decoded has no float dtype of its own: what it stores in blocks, and most norms, would be float32.
    They become bfloat16, or of the dtype of matrices in floats, if the output is quantized for another engine than
    llama.cpp, all of which take it.

    Raises:
        BadSpec: the dtype was asked for where it cannot be.
    """
    wanted = target.kept_dtype
    if wanted == "source":
        return None
    if wanted != "auto":
        _check(target, checkpoint, is_decoded=is_decoded)
        return next(dtype for dtype in DTYPES.values() if dtype.torch == wanted)
    if checkpoint.container != "gguf" or not is_decoded or isinstance(target.scheme, Plain):
        return None
    matrices = load_dtype(checkpoint.config)
    return DTYPES["BF16"] if matrices == DTYPES["F32"] else matrices


def _check(target: Target, checkpoint: Checkpoint, *, is_decoded: bool) -> None:
    if target.layout.name == "gguf":
        raise BadSpec("output.dtype: a GGUF's tensors have llama.cpp's types; quant.file_type and rules choose them")
    if is_of_diffusers(checkpoint):
        raise BadSpec("output.dtype: components of diffusers have a dtype each; quant=none quant.dtype=... casts them")
    if isinstance(target.scheme, Plain) and target.scheme.dtype is not None:
        raise BadSpec("output.dtype: quant.dtype casts all weights already; give one of the two")
    if checkpoint.quantized_by is not None and not is_decoded:
        raise BadSpec(
            "output.dtype: a quantized source is copied as it is stored; quant.dtype=... decodes it to such floats"
        )


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
