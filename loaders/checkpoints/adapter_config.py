"""adapter_config.json of peft: the settings that decide about a merge, checked; what is not merged is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.limits import check_patterns
from loaders.patterns import Allowance, Pattern, compiled

CONFIG = "adapter_config.json"
# How B and A may begin without changing the base. Other ways subtract them from it, so that the sum needs that base.
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")
RESIDUAL_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Variants that are more than B @ A with a magnitude, or that act on some tokens only. peft merges none of the first
# four; the others change the base, or draw numbers at random.
UNMERGED = {
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it chooses among adapters at run time",
    "use_qalora": "it works on groups of a quantized base",
    "use_bdlora": "its factors are blocks on the diagonal",
    "kasa_config": "it changes the base as well",
    "monteclora_config": "it samples its factors",
    "megatron_config": "its factors are those of Megatron's parallel layers",
    "layer_replication": "it repeats layers of the base",
}
PLAIN = re.compile(r"[\w.\-]+")
LARGEST = 1 << 53


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The settings of an adapter that decide about its merge. `layers` None: those that it has tensors of."""

    rank: int
    alpha: float
    ranks: Patterns
    alphas: Patterns
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    layers: tuple[int, ...] | None
    tokens: Mapping[str, tuple[int, ...]]
    target_parameters: tuple[str, ...]
    base: str | None

    def rank_of(self, module: str) -> int:
        """Return the rank that the config gives a module."""
        return int(self.ranks.value(module, self.rank))

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of B @ A."""
        alpha = self.alphas.value(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def is_saved(self, module: str) -> bool:
        """Whether modules_to_save names the module."""
        return any(module == name or module.endswith(f".{name}") for name in self.modules_to_save)


class Patterns:
    """rank_pattern or alpha_pattern: numbers by names' endings or regular expressions; the first that fits counts."""

    def __init__(self, key: str, given: Mapping[str, Any]) -> None:
        self._plain: dict[str, tuple[int, float]] = {}
        self._patterns: list[tuple[int, Pattern, float]] = []
        check_patterns(sum(PLAIN.fullmatch(pattern) is None for pattern in given), f"{CONFIG}: {key}")
        allowance = Allowance()
        for index, (pattern, value) in enumerate(given.items()):
            number = _number(f"{key}[{pattern!r}]", value)
            if PLAIN.fullmatch(pattern):
                self._plain.setdefault(pattern, (index, number))
            else:
                self._patterns.append((index, _compiled(key, pattern, allowance), number))

    def value(self, module: str, default: float) -> float:
        """Return the number for a module, as peft looks it up."""
        parts = module.split(".")
        endings = (".".join(parts[at:]) for at in range(len(parts)))
        found = [self._plain[ending] for ending in endings if ending in self._plain]
        found += [(index, number) for index, pattern, number in self._patterns if pattern.match(module)]
        return min(found, default=(0, default))[1]


def _compiled(key: str, pattern: str, allowance: Allowance) -> Pattern:
    return compiled(rf"(.*\.)?({pattern})$", f"{CONFIG}: {key}", allowance)


def lora_settings(config: Mapping[str, Any]) -> LoraSettings:
    """Read an adapter's config.

    Raises:
        BadSpec: an adapter of this kind is not merged; the message names the kind and what to do.
        BadCheckpoint: a value has a wrong type.
    """
    _check_kind(config)
    layers = config.get("layers_to_transform")
    return LoraSettings(
        rank=int(_number("r", config.get("r", 8))),
        alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
        ranks=Patterns("rank_pattern", _mapping("rank_pattern", config)),
        alphas=Patterns("alpha_pattern", _mapping("alpha_pattern", config)),
        use_rslora=_flag("use_rslora", config),
        use_dora=_flag("use_dora", config),
        fan_in_fan_out=_flag("fan_in_fan_out", config),
        modules_to_save=_names("modules_to_save", config),
        layers=None if layers is None else _integers("layers_to_transform", layers),
        tokens=_tokens(config.get("trainable_token_indices")),
        target_parameters=_names("target_parameters", config),
        base=config["base_model_name_or_path"] if isinstance(config.get("base_model_name_or_path"), str) else None,
    )


def _check_kind(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadSpec(
            f"{setting('adapter')}: its {CONFIG} says peft_type {kind!r}; expected LORA: merge others with peft"
            " (merge_and_unload), and give the merged model"
        )
    start = config.get("init_lora_weights", True)
    name = start.lower() if isinstance(start, str) else ""
    if name.startswith(RESIDUAL_STARTS):
        raise BadSpec(
            f"{setting('adapter')}: init_lora_weights={start!r} changed the base, and the adapter fits only what was"
            " left of it; convert it to a plain LoRA (peft's save_pretrained with"
            " path_initial_model_for_weight_conversion), or merge it with peft"
        )
    if not isinstance(start, bool | None) and name not in HARMLESS_STARTS:
        raise BadSpec(
            f"{setting('adapter')}: init_lora_weights={start!r} is not known, and may have changed the base; merge it"
            " with peft (merge_and_unload)"
        )
    for key, why in UNMERGED.items():
        if config.get(key):
            raise BadSpec(
                f"{setting('adapter')}: {key} is set, and such an adapter is not merged: {why}; merge it with peft if"
                " peft can (merge_and_unload)"
            )


# --- values of JSON, whose types nobody has checked


def _wrong(key: str, expected: str, found: Any) -> BadCheckpoint:
    return BadCheckpoint(f"{CONFIG}: {key}: expected {expected}, found {str(found)[:80]!r}")


def _number(key: str, value: Any) -> float:
    # The bound also refuses NaN, infinities, and whole numbers that no float holds.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise _wrong(key, "a number", value)
    return value


def _flag(key: str, config: Mapping[str, Any]) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise _wrong(key, "true or false", value)
    return bool(value)


def _mapping(key: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong(key, "an object", value)
    return value


def _names(key: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _wrong(key, "a list of names", value)
    return tuple(value)


def _integers(key: str, value: Any) -> tuple[int, ...]:
    given = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in given):
        raise _wrong(key, "whole numbers from 0 on", value)
    return tuple(given)


def _tokens(value: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the indices of trained tokens by module; a mere list is of the input embeddings, here called ""."""
    if isinstance(value, dict):
        return {name: _integers(f"trainable_token_indices[{name!r}]", each) for name, each in value.items()}
    return {} if value is None else {"": _integers("trainable_token_indices", value)}
