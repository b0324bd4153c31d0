"""Rules: which tensor gets quantized, kept, cast or dropped. An ordered list, the first that matches decides.

A user's rules come first, then the engine's own: what its loader does and does not quantize, by the family's roles.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from loaders.errors import BadSpec
from loaders.quantization.plain import Plain
from loaders.quantization.scheme import Scheme
from loaders.recipes import Recipe
from loaders.specs import DTYPES, WEIGHT_DTYPES

Action = Literal["quantize", "keep", "cast", "drop"]


@dataclass(frozen=True, slots=True)
class Rule:
    """All that is given must hold.

    name: a regular expression, searched in the tensor's name. shape: one entry a dimension, None for any size.
    dtype: names such as "BF16". role: see `loaders.families.ROLES`. cast_to: the dtype of action "cast".
    scheme: that of action "quantize" where it is not the target's. names: exact ones, of a mix.
    """

    action: Action
    why: str
    name: str | None = None
    shape: tuple[int | None, ...] | None = None
    dtype: tuple[str, ...] | None = None
    role: tuple[str, ...] | None = None
    cast_to: str | None = None
    label: str = ""
    scheme: Scheme | None = None
    names: frozenset[str] | None = None

    def matches(self, recipe: Recipe) -> bool:
        return (
            (self.names is None or recipe.name in self.names)
            and (self.role is None or recipe.role in self.role)
            and (self.dtype is None or recipe.dtype.name in self.dtype)
            and (self.shape is None or _fits(self.shape, recipe.shape))
            and (self.name is None or re.search(self.name, recipe.name) is not None)
        )

    def __str__(self) -> str:
        conditions = [f"name ~ {self.name}"] if self.name is not None else []
        if self.shape is not None:
            conditions.append(f"shape {'x'.join('*' if n is None else str(n) for n in self.shape)}")
        conditions += [f"dtype {'|'.join(self.dtype)}"] if self.dtype else []
        conditions += [f"role {'|'.join(self.role)}"] if self.role else []
        conditions += [f"{len(self.names)} by name"] if self.names is not None else []
        return " and ".join(conditions) or "everything else"


def _fits(wanted: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(wanted) == len(shape) and all(w is None or w == n for w, n in zip(wanted, shape, strict=True))


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a tensor, by which scheme, and the rule that said so."""

    recipe: Recipe
    action: Action
    scheme: Scheme | None  # None: dropped
    rule: Rule


NOT_FLOAT = tuple(name for name in DTYPES if name not in WEIGHT_DTYPES)
LINEAR = ("attention", "mlp", "linear")
EXPERTS_KEPT = (
    "transformers 5 fuses a layer's experts into one parameter, which {engine} does not quantize; experts quantized one"
    " by one load in transformers 4 only"
)


def _engine_rules(engine: str, conversion: str) -> tuple[Rule, ...]:
    return (
        Rule("keep", "not a float dtype that is quantized", dtype=NOT_FLOAT),
        Rule("keep", f"{engine} keeps embeddings", role=("embedding",)),
        Rule("keep", f"{engine} keeps the output projection", role=("head",)),
        Rule("keep", "a router decides; rounding it changes the choice of experts", role=("router",)),
        Rule("keep", EXPERTS_KEPT.format(engine=engine), role=("expert",)),
        Rule("keep", "no matrix of a linear layer", role=("norm", "conv", "bias", "buffer", "other")),
        Rule("quantize", conversion, role=(*LINEAR, "vision"), shape=(None, None)),
        Rule("keep", "no matrix"),
    )


DEFAULTS: dict[str, tuple[Rule, ...]] = {
    "hqq": _engine_rules("hqq", "hqq makes every nn.Linear but the head an HQQLinear"),
    "bitsandbytes": _engine_rules("bitsandbytes", "transformers makes every nn.Linear a Linear4bit or Linear8bitLt"),
    "bitnet": _engine_rules("bitnet", "transformers makes every nn.Linear a BitLinear"),
}


DEFAULTS["compressed-tensors"] = (
    Rule("keep", "not a float dtype that is quantized", dtype=NOT_FLOAT),
    Rule("keep", "llm-compressor's recipes keep embeddings", role=("embedding",)),
    Rule("keep", "llm-compressor's recipes keep the output projection", role=("head",)),
    Rule("keep", "a router decides; rounding it changes the choice of experts", role=("router",)),
    Rule("keep", "no matrix of a linear layer", role=("norm", "conv", "bias", "buffer", "other")),
    Rule("quantize", "llm-compressor quantizes every linear layer", role=LINEAR, shape=(None, None)),
    Rule("quantize", "each expert by itself, as vLLM loads them", role=("expert",), shape=(None, None)),
    Rule("keep", "no matrix"),
)


def default_rules(scheme: Scheme) -> tuple[Rule, ...]:
    """The engine's own rules for a scheme."""
    if isinstance(scheme, Plain):
        if scheme.dtype is None:
            return (Rule("keep", "copied as it is"),)
        return (
            Rule("keep", "not a float dtype that is cast", dtype=tuple(n for n in NOT_FLOAT if DTYPES[n].block == 1)),
            Rule("cast", "quant.dtype", cast_to=scheme.dtype),
        )
    return DEFAULTS[scheme.engine]


class Mix(Protocol):
    """A preset that gives tensors different schemes: a function over the whole list that makes the engine's rules."""

    def rules(self, recipes: Sequence[Recipe], config: Mapping[str, Any]) -> tuple[Rule, ...]: ...


def decide(
    recipes: Sequence[Recipe], scheme: Scheme, own: Sequence[Rule], engine: Sequence[Rule] | None = None
) -> tuple[Decision, ...]:
    """Give every tensor its action. `engine` are the rules after the user's own, by default those of the scheme.

    Raises:
        BadSpec: a rule of the user's matches nothing, or asks for what the scheme cannot do; all such faults at once.
    """
    rules = (*own, *(default_rules(scheme) if engine is None else engine))
    decisions, problems = [], []
    used: set[int] = set()
    for recipe in recipes:
        index = next(i for i, rule in enumerate(rules) if rule.matches(recipe))
        used.add(index)
        decision, problem = _decision(recipe, rules[index], scheme)
        decisions.append(decision)
        problems += [problem] if problem else []
    for index, rule in enumerate(own):
        if index not in used:
            problems.append(_unused(rule, recipes))
    if problems:
        raise BadSpec(problems)
    return tuple(decisions)


def _decision(recipe: Recipe, rule: Rule, scheme: Scheme) -> tuple[Decision, str | None]:
    if rule.action == "drop":
        return Decision(recipe, "drop", None, rule), None
    chosen: Scheme = rule.scheme or scheme
    if rule.action == "quantize" and isinstance(chosen, Plain):
        said = f"{rule.label or 'quant'}: cannot quantize {recipe.name}: quant=none has no codes; choose a quant"
        return Decision(recipe, "keep", Plain(), rule), said
    if rule.action == "keep":
        chosen = Plain()
    elif rule.action == "cast":
        chosen = Plain(rule.cast_to)
    refusal = chosen.refuses(recipe.spec)
    place = rule.label or "quant"
    problem = f"{place}: cannot {rule.action} {recipe.name}: {refusal}" if refusal else None
    return Decision(recipe, rule.action, chosen, rule), problem


def _unused(rule: Rule, recipes: Sequence[Recipe]) -> str:
    matching = sum(rule.matches(recipe) for recipe in recipes)
    if matching:
        return (
            f"{rule.label}: the {matching} tensors it matches ({rule}) are all taken by rules before it; reorder them"
        )
    names = [recipe.name for recipe in recipes]
    likely = [name for name in names if rule.name and fnmatch.fnmatch(name, f"*{rule.name.strip('^$*')}*")]
    hint = f"such as {likely[0]!r}" if likely else f"the checkpoint's names look like {names[len(names) // 2]!r}"
    return f"{rule.label}: it matches no tensor ({rule}); {hint}"
