"""Rotary embeddings as mlx-lm computes them: what its models ignore, and the settings that make it compute the same.

Facts are from mlx_lm 0.32, models/rope_utils.py (initialize_rope) and the models that do without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loaders.architectures.family import text_config
from loaders.architectures.mlx import MlxModel
from loaders.architectures.rope import attention_factor, rope_number, rope_of, usual_attention_factor

SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope", "mrope")  # those of initialize_rope


def rope_fault(model: MlxModel, text: Mapping[str, Any]) -> str | None:
    """Say what of a model's rotary embeddings mlx-lm would not compute, or return None."""
    if model.apart:
        return None
    rope = rope_of(text)
    kind = rope.get("rope_type", "default")
    known = SCALINGS if model.scalings is None else model.scalings
    if kind != "default" and kind not in known:
        which = f"only {', '.join(known)}" if known else "no rope scaling"
        return f"knows {which}, and config.json has {kind}"
    if kind == "yarn" and rope.get("truncate", True) is False:
        return "rounds the range of yarn's ramp, and truncate is false"
    if kind == "yarn" and rope_number(rope, "factor") <= 1 and attention_factor(rope) not in (None, 1.0):
        return "takes no attention_factor for a yarn that stretches nothing"
    if kind == "longrope" and not math.isclose(_longrope_scale(rope, text), _mlx_longrope_scale(rope, text)):
        return "works longrope's attention_factor out from the lengths, and config.json says another"
    return None


def _longrope_scale(rope: Mapping[str, Any], text: Mapping[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return rope_number(rope, "attention_factor")
    return _scale(rope_number(rope, "factor") if rope.get("factor") is not None else _ratio(rope, text), rope)


def _mlx_longrope_scale(rope: Mapping[str, Any], text: Mapping[str, Any]) -> float:
    return _scale(_ratio(rope, text), rope)


def _ratio(rope: Mapping[str, Any], text: Mapping[str, Any]) -> float:
    lengths = {"max": text_config(text, "max_position_embeddings")}
    return rope_number(lengths, "max") / rope_number(rope, "original_max_position_embeddings")


def _scale(factor: float, rope: Mapping[str, Any]) -> float:
    original = rope_number(rope, "original_max_position_embeddings")
    return 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def scaling_for_mlx(model: MlxModel, scaling: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rope scaling with which mlx-lm computes what transformers does, and transformers the same as before.

    mlx-lm has other defaults for the length of the texts before the scaling, and reads no attention_factor: it has one
    that it works out from mscale.
    """
    made, rope = dict(scaling), rope_of({**text, "rope_scaling": scaling, "rope_parameters": None})
    kind = rope.get("rope_type")
    if kind in ("llama3", "yarn") and made.get("original_max_position_embeddings") is None:
        made["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if kind != "yarn" or model.apart:
        return made
    made = {key: value for key, value in made.items() if value or key not in ("beta_fast", "beta_slow")}
    factor = rope_number(rope, "factor")
    said = attention_factor(rope)
    wanted = usual_attention_factor(factor) if said is None else said
    if factor > 1 and not math.isclose(_mlx_yarn_scale(made, factor), wanted):
        made |= {"mscale": (wanted - 1) / (0.1 * math.log(factor)), "mscale_all_dim": 0}
    return made


def _mlx_yarn_scale(scaling: Mapping[str, Any], factor: float) -> float:
    one, other = (
        1.0 + (0.1 * rope_number(scaling, key, usual) * math.log(factor) if scaling.get(key, usual) else 0.0)
        for key, usual in (("mscale", 1.0), ("mscale_all_dim", 0.0))
    )
    return one / other


def ignored_factors(model: MlxModel, model_type: str, text: Mapping[str, Any]) -> list[str]:
    """Warn that mlx-lm takes longrope's factors for long texts whatever a text's length."""
    rope = {} if model.apart else rope_of(text)
    if rope.get("rope_type") != "longrope" or rope.get("short_factor") == rope.get("long_factor"):
        return []
    return [
        f"mlx-lm takes {model_type}'s long_factor for texts of any length: those of at most"
        f" {rope['original_max_position_embeddings']} tokens come out otherwise than in transformers"
    ]
