"""What a scheme refuses: tensors of a few ragged rows are kept, everything else is told, one line for each cause."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loaders.quantization.scheme import LeavesRagged
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Decision, Rule
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor

RAGGED = "groups do not divide its rows, and the engine takes layers that are not quantized"
# The largest share of the weights to be quantized that stays plain without being asked: a vision tower's, not a third
# of every layer.
RAGGED_SHARE = 0.1
FIRST = 3  # names in a message
MOST_PATTERNS = 8  # kinds of names in a rule to paste; more are told by their shape


def kept_ragged(decisions: Sequence[Decision], refused: Mapping[str, str]) -> dict[str, Decision]:
    """Return decisions to keep tensors that their scheme refuses for ragged rows alone, by name.

    Only the engine's own rules give way, and only if at most RAGGED_SHARE of what they quantize would stay plain.
    `refused` are the reasons of refusals, by name.
    """
    mine = [d for d in decisions if d.action == "quantize" and not d.rule.label]
    ragged = [
        d for d in mine
        if d.tensor.name in refused and isinstance(d.scheme, LeavesRagged) and d.scheme.is_ragged(d.tensor.spec)
    ]  # fmt: skip
    total, plain = (sum(d.tensor.spec.numel for d in some) for some in (mine, ragged))
    if not ragged or plain > RAGGED_SHARE * total:
        return {}
    rule = Rule(action="keep", why=RAGGED, names=frozenset(d.tensor.name for d in ragged))
    kept = {}
    for decision in ragged:
        encoding = Encoding(tensor=decision.tensor, action="keep", scheme=Plain())
        kept[decision.tensor.name] = replace(decision, rule=rule, encoding=encoding)
    return kept


def ragged_notes(decisions: Sequence[Decision]) -> list[str]:
    """Return a sentence about the tensors that stay plain because of ragged rows."""
    ragged = [d.tensor for d in decisions if d.rule.why == RAGGED]
    if not ragged:
        return []
    total = sum(d.tensor.spec.numel for d in decisions if d.action == "quantize")
    plain = sum(tensor.spec.numel for tensor in ragged)
    return [
        f"{len(ragged)} matrices stay {ragged[0].dtype.torch}, {_listed(ragged)}: their rows"
        f" ({', '.join(map(str, sorted({tensor.shape[-1] for tensor in ragged})))}) do not divide into groups; they are"
        f" {plain / (plain + total):.1%} of the weights to be quantized"
    ]


def refusal_line(place: str, action: str, why: str, tensors: Sequence[LogicalTensor]) -> str:
    """Return one line about all tensors that are refused for one reason, with the rule that keeps them."""
    if len(tensors) == 1:
        return f"{place}: cannot {action} {tensors[0].name}: {why}"
    return (
        f"{place}: cannot {action} {len(tensors)} tensors, {_listed(tensors)}: {why}; to keep them:"
        f" rules='[{{action: keep, {_condition(tensors)}}}]'"
    )


def _listed(tensors: Sequence[LogicalTensor]) -> str:
    names = ", ".join(tensor.name for tensor in tensors[:FIRST])
    return names if len(tensors) <= FIRST else f"{names} first"


def _condition(tensors: Sequence[LogicalTensor]) -> str:
    """Return a rule's condition that takes these tensors: their names without numbers, or the length of their rows."""
    kinds = sorted({re.sub(r"\d+", r"\\d+", re.escape(tensor.name)) for tensor in tensors})
    if len(kinds) <= MOST_PATTERNS:
        return f'name: "^{kinds[0]}$"' if len(kinds) == 1 else f'name: "^({"|".join(kinds)})$"'
    [(dimensions, columns), *others] = {(len(tensor.shape), tensor.shape[-1:]) for tensor in tensors}
    if not others and columns:
        return f"shape: [{', '.join(['null'] * (dimensions - 1) + [str(columns[0])])}]"
    return f"role: [{', '.join(sorted({tensor.role for tensor in tensors}))}]"
