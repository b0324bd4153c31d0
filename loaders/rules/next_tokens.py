"""Layers for multi-token prediction: what a job does with them, and what each engine's own tool does.

They guess further tokens, which the model's other layers then check. llama.cpp's converter writes them for the
architectures that have a place for them, mlx-lm drops them, llm-compressor keeps them as they are, and transformers
never loads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from loaders.errors import BadSpec, setting
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Rule

NextTokens = Literal["auto", "keep", "quantize", "drop"]
KEPT = {"compressed-tensors": "llm-compressor keeps layers for multi-token prediction as they are"}
NOT_LOADED = "transformers loads no layers for multi-token prediction"
LINEAR = ("attention", "mlp", "linear", "expert", "mtp")


def next_token_rules(
    choice: NextTokens,
    scheme: Scheme,
    names: Sequence[str],
    usual: Sequence[Rule],
    *,
    has_none: str | None = None,
    is_gguf: bool = False,
) -> tuple[Rule, ...]:
    """Return the rules about tensors for multi-token prediction, `names`; they go before the engine's own, `usual`.

    `has_none` says why the output's engine has no place for such layers; None if it has.

    Raises:
        BadSpec: the engine cannot do what is chosen, or there are no such tensors.
    """
    key = setting("mtp")
    if not names:
        if choice != "auto":
            raise BadSpec(f"{key}: {choice} was asked, and the checkpoint has no layers for multi-token prediction")
        return ()
    these = frozenset(names)
    if has_none is not None:
        if choice in ("keep", "quantize"):
            raise BadSpec(f"{key}: cannot {choice} layers for multi-token prediction: {has_none}; drop leaves them out")
        return (Rule(action="drop", why=has_none, names=these),)
    if choice == "drop":
        return (Rule(action="drop", why=f"{key}=drop", names=these),)
    if choice == "keep":
        return (Rule(action="keep", why=f"{key}=keep", names=these),)
    if is_gguf:
        return _as_others(usual, these)
    if choice == "auto":
        why = KEPT.get(scheme.engine, NOT_LOADED)
        return () if isinstance(scheme, Plain) else (Rule(action="keep", why=why, names=these),)
    if scheme.engine not in KEPT:
        raise BadSpec(f"{key}: cannot quantize layers for multi-token prediction: {NOT_LOADED}; choose keep or drop")
    return (Rule(action="quantize", why=f"{key}=quantize", names=these, role=LINEAR, shape=(None, None)),)


def _as_others(usual: Sequence[Rule], names: frozenset[str]) -> tuple[Rule, ...]:
    """Return the engine's rules for these tensors alone, so that a plan shows what becomes of them."""
    narrowed = ((rule, names if rule.names is None else rule.names & names) for rule in usual)
    return tuple(replace(rule, why=f"multi-token prediction: {rule.why}", names=few) for rule, few in narrowed if few)
