"""The decision about each tensor, by the first rule that matches it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from loaders.dtypes import DType, Shape
from loaders.errors import BadSpec, setting
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.plain import Plain
from loaders.rules.defaults import default_rules
from loaders.rules.refusals import cause_of, kept_ragged, refusal_line
from loaders.rules.rule import Decision, Rule
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor, transposed
from loaders.words import counted


def decide(
    tensors: Sequence[LogicalTensor],
    scheme: Scheme,
    own: Sequence[Rule],
    engine: Sequence[Rule] | None = None,
    *,
    kept_dtype: DType | None = None,
) -> tuple[Decision, ...]:
    """Decide about every tensor. `own` are the user's rules; `engine` follow them, by default those of the scheme.

    To `kept_dtype` kept floats are cast afterwards, which refusals count where they tell sizes.

    Raises:
        BadSpec: a rule of the user's matches nothing, or asks for what a scheme cannot do; all such faults at once.
    """
    rules = (*own, *(default_rules(scheme) if engine is None else engine))
    decisions: list[Decision] = []
    refused: dict[str, str] = {}
    used: set[int] = set()
    first_of = _FirstRule(rules)
    for tensor in tensors:
        index = first_of(tensor)
        used.add(index)
        decision, refusal = _decision(tensor, rules[index], scheme)
        decisions.append(decision)
        if refusal is not None:
            refused[tensor.name] = refusal
    kept = kept_ragged(decisions, refused) if refused else {}
    left = [d for d in decisions if d.tensor.name in refused.keys() - kept.keys()]
    problems = _problems(left, refused, decisions, kept_dtype)
    problems += [_unused(rule, tensors) for index, rule in enumerate(own) if index not in used]
    if problems:
        raise BadSpec(problems)
    return tuple(kept.get(decision.tensor.name, decision) for decision in decisions)


class _FirstRule:
    """The first rule that matches a tensor. What rules without names say is the same for tensors of a kind."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        by_name = [rule.name is not None or rule.names is not None for rule in rules]
        self._named = [(index, rule) for index, rule in enumerate(rules) if by_name[index]]
        self._others = [(index, rule) for index, rule in enumerate(rules) if not by_name[index]]
        self._end = len(rules)
        self._known: dict[tuple[str, str, Shape], int] = {}

    def __call__(self, tensor: LogicalTensor) -> int:
        """Return its index. There is always one: an engine's rules take every tensor that is left."""
        kind = tensor.role, tensor.dtype.name, tensor.shape
        other = self._known.get(kind)
        if other is None:
            matching = (index for index, rule in self._others if rule.matches(tensor))
            other = self._known[kind] = next(matching, self._end)
        found = next((index for index, rule in self._named if index < other and rule.matches(tensor)), other)
        assert found < self._end, tensor.name
        return found


def _decision(tensor: LogicalTensor, rule: Rule, scheme: Scheme) -> tuple[Decision, str | None]:
    """Decide about a tensor by a rule; the second result says why the rule cannot be followed."""
    if rule.action == "drop":
        return Decision(tensor, rule, None), None
    chosen: Scheme = rule.scheme or scheme
    if rule.action == "quantize" and tensor.role == "conv1d":
        if chosen.engine != "bitsandbytes":
            key = rule.label or setting("quantize")
            said = (
                f"{key}: cannot quantize {tensor.name}: it is stored as [inputs, outputs], and {chosen.engine} has no"
                " such layer"
            )
            return Decision(tensor, rule, Encoding(tensor=tensor, action="keep", scheme=Plain())), said
        tensor = transposed(tensor)
    if rule.action == "quantize" and isinstance(chosen, Plain):
        said = f"{setting('quantize')}=none has no codes; choose another"
        return Decision(tensor, rule, Encoding(tensor=tensor, action="quantize", scheme=chosen)), said
    if rule.action == "keep":
        chosen = Plain()
    elif rule.action == "cast":
        chosen = Plain(rule.cast_to)
    decision = Decision(tensor, rule, Encoding(tensor=tensor, action=rule.action, scheme=chosen))
    return decision, chosen.refuses(tensor.spec)


def _problems(
    mine: Sequence[Decision], refused: Mapping[str, str], decisions: Sequence[Decision], kept_dtype: DType | None
) -> list[str]:
    """Return a line for each cause of refusals."""
    causes: dict[tuple[str, str, str], list[Decision]] = {}
    for decision in mine:
        place, cause = decision.rule.label or setting("quantize"), cause_of(decision, refused[decision.tensor.name])
        causes.setdefault((place, decision.action, cause), []).append(decision)
    return [
        refusal_line(place, refused[found[0].tensor.name], found, decisions, kept_dtype)
        for (place, _, _), found in causes.items()
    ]


def _unused(rule: Rule, tensors: Sequence[LogicalTensor]) -> str:
    """Say why a rule decided about no tensor: earlier rules took all that it matches, or it matches none."""
    matching = sum(rule.matches(tensor) for tensor in tensors)
    if matching:
        return (
            f"{rule.label}: what it matches ({rule}: {counted(matching, 'tensor')}) is all taken by rules before it;"
            " reorder them"
        )
    names = [tensor.name for tensor in tensors]
    if rule.role is not None and not any(tensor.role in rule.role for tensor in tensors):
        roles = ", ".join(sorted({tensor.role for tensor in tensors}))
        return f"{rule.label}: it matches no tensor ({rule}); the roles of this checkpoint's tensors are {roles}"
    likely = [name for name in names if rule.name and fnmatch.fnmatch(name, f"*{rule.name.strip('^$*')}*")]
    hint = f"such as {likely[0]!r}" if likely else f"the checkpoint's names look like {names[len(names) // 2]!r}"
    return f"{rule.label}: it matches no tensor ({rule}); {hint}"
