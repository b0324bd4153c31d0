"""What a scheme refuses: tensors of a few ragged rows are kept, everything else is told, one line for each cause."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loaders.dtypes import DType
from loaders.errors import setting
from loaders.quantization.scheme import Grouped, LeavesRagged, Scheme
from loaders.quantization.schemes.plain import Plain
from loaders.rules.kept import cast_kept
from loaders.rules.mlx import UNDIVIDED
from loaders.rules.rule import Decision, Rule
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.words import counted, size

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
    ragged = [d for d in mine if d.tensor.name in refused and _is_ragged(d)]
    if not ragged or _share(_tensors(ragged), _tensors(mine)) > RAGGED_SHARE:
        return {}
    rule = Rule(action="keep", why=RAGGED, names=frozenset(d.tensor.name for d in ragged))
    return {d.tensor.name: replace(d, rule=rule, encoding=_plain(d)) for d in ragged}


def _is_ragged(decision: Decision) -> bool:
    scheme = decision.scheme
    return isinstance(scheme, LeavesRagged) and scheme.is_ragged(decision.tensor.spec)


def _plain(decision: Decision) -> Encoding:
    return Encoding(tensor=decision.tensor, action="keep", scheme=Plain())


def cause_of(decision: Decision, why: str) -> str:
    """Return what is the same of refusals that are told in one line: of ragged rows, all but how long they are."""
    return re.sub(r"\d+ columns", "columns", why, count=1) if _is_ragged(decision) else why


def _tensors(decisions: Sequence[Decision]) -> list[LogicalTensor]:
    return [decision.tensor for decision in decisions]


def _share(some: Sequence[LogicalTensor], all_: Sequence[LogicalTensor]) -> float:
    return sum(tensor.spec.numel for tensor in some) / sum(tensor.spec.numel for tensor in all_)


def ragged_notes(decisions: Sequence[Decision]) -> list[str]:
    """Return a sentence about the tensors that stay plain because of ragged rows."""
    ragged = [d.tensor for d in decisions if d.rule.why == RAGGED]
    if not ragged:
        return []
    total = sum(d.tensor.spec.numel for d in decisions if d.action == "quantize")
    plain = sum(tensor.spec.numel for tensor in ragged)
    return [
        f"{counted(len(ragged), 'matrix stays', 'matrices stay')} {ragged[0].dtype.torch}, {_listed(ragged)}: rows of"
        f" {', '.join(map(str, sorted({tensor.shape[-1] for tensor in ragged})))} do not divide into groups; that is"
        f" {plain / (plain + total):.1%} of the weights to be quantized"
    ]


def undivided_notes(scheme: Scheme, decisions: Sequence[Decision]) -> list[str]:
    """Return a sentence about the matrices that mlx-lm leaves alone, and the size of groups that would fit them."""
    if not isinstance(scheme, Grouped):
        return []
    left = [d.tensor for d in decisions if d.rule.why.startswith(UNDIVIDED.format(scheme.group_size))]
    if not left:
        return []
    wanted = [*(d.tensor for d in decisions if d.action == "quantize"), *left]
    columns = " and ".join(map(str, sorted({tensor.shape[-1] for tensor in left})))
    return [
        f"{counted(len(left), 'matrix stays', 'matrices stay')} plain, {_listed(left)},"
        f" {_share(left, wanted):.0%} of the weights to be quantized: groups of {scheme.group_size} do not divide rows"
        f" of {columns}{_other_groups(scheme, '', wanted)}"
    ]


def refusal_line(
    place: str, why: str, refused: Sequence[Decision], decisions: Sequence[Decision], kept_dtype: DType | None = None
) -> str:
    """Return one line about all tensors that are refused for one reason, with what can be done about them.

    `decisions` are those about all tensors of the model. Kept floats are cast to `kept_dtype`.
    """
    tensors, action, is_ragged = [d.tensor for d in refused], refused[0].action, _is_ragged(refused[0])
    what = tensors[0].name if len(tensors) == 1 else f"{len(tensors)} tensors ({tensors[0].name} first)"
    if is_ragged:
        columns = " and ".join(map(str, sorted({tensor.shape[-1] for tensor in tensors})))
        why = re.sub(r"\d+ columns", f"{columns} columns", why, count=1)
    said = f"{place}: cannot {action} {what}: {why if len(tensors) == 1 else re.sub('^its ', 'their ', why)}"
    if is_ragged:
        mine = [d.tensor for d in decisions if d.action == "quantize" and d.scheme == refused[0].scheme]
        said += _other_groups(refused[0].scheme, refused[0].rule.label, mine)
    if is_ragged or len(tensors) > 1:
        keeping = setting("leave {it} out, or let a job keep {it} by rules=").format(
            it="it" if len(tensors) == 1 else "them"
        )
        said += f"; {keeping}'[{{action: keep, {_condition(tensors)}}}]'"
    return said + (_cost(decisions, kept_dtype) if is_ragged else "")


def _other_groups(scheme: Scheme | None, label: str, tensors: Sequence[LogicalTensor]) -> str:
    """Say which size of groups divides the rows of all tensors, or most of them; `label` is that of their rule."""
    if not isinstance(scheme, Grouped):
        return ""
    left = {n: _share([t for t in tensors if t.shape[-1] % n], tensors) for n in scheme.group_sizes}
    best = min(left, key=lambda n: (left[n], -n))
    if left[best] > RAGGED_SHARE:
        return f"; no group size that {scheme.engine} takes ({', '.join(map(str, left))}) divides enough of the rows"
    whole = "all" if not left[best] else f"all but {left[best]:.1%} of the weights"
    key = f"{label}.quant.group_size" if label else setting("group_size")
    return f"; {key}={best} fits {whole}"


def _cost(decisions: Sequence[Decision], kept_dtype: DType | None) -> str:
    """Say how much of the model stays plain, and how large the output is, if all ragged rows are kept."""
    wanted = [d for d in decisions if d.action == "quantize"]
    ragged = {d.tensor.name for d in wanted if _is_ragged(d)}
    share = _share([d.tensor for d in wanted if d.tensor.name in ragged], _tensors(wanted))
    rule = Rule(action="keep", why=RAGGED)
    left = [
        replace(d, rule=rule, encoding=_plain(d)) if d.scheme is not None and d.scheme.refuses(d.tensor.spec) else d
        for d in decisions
    ]
    encodings = [d.encoding for d in cast_kept(left, kept_dtype)]
    after = sum(part.size for each in encodings if each is not None for part in each.stored.values())
    before = sum(d.tensor.source_bytes for d in decisions)
    # A few ragged rows are kept without a rule; here they are too many, or a rule of the user's wants them quantized.
    return (
        f" (then {share:.0%} of the weights to be quantized stay plain; the output has about {size(after)}, the source"
        f" {size(before)})"
    )


def _listed(tensors: Sequence[LogicalTensor]) -> str:
    names = ", ".join(tensor.name for tensor in tensors[:FIRST])
    return names if len(tensors) <= FIRST else f"{names} first"


def _condition(tensors: Sequence[LogicalTensor]) -> str:
    """Return a rule's condition that takes these tensors: their names without numbers, or the length of their rows."""
    # Only numbers that are whole parts of a name count things: fc1 and fc2 are two layers, of other shapes.
    kinds = sorted({re.sub(r"(?<![^.])\d+(?![^.\\])", r"\\d+", re.escape(tensor.name)) for tensor in tensors})
    if len(kinds) <= MOST_PATTERNS:
        return f'name: "^{kinds[0]}$"' if len(kinds) == 1 else f'name: "^({"|".join(kinds)})$"'
    [(dimensions, columns), *others] = {(len(tensor.shape), tensor.shape[-1:]) for tensor in tensors}
    if not others and columns:
        return f"shape: [{', '.join(['null'] * (dimensions - 1) + [str(columns[0])])}]"
    return f"role: [{', '.join(sorted({tensor.role for tensor in tensors}))}]"
