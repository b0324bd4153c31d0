"""The damage of an output: what quantization cost, as its report and its model card say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.output.report import Damage, Judged, ReportedTensor, RoleDamage, Totals, WorstTensor, stats_of
from jobs.report.metrics import worst_of
from loaders.stats import finite


def damage_of(
    tensors: Sequence[ReportedTensor], totals: Totals, engine: str, quality: Mapping[str, Any] | None
) -> Damage:
    """Sum up the damage of an output that is written for an engine."""
    changed = [tensor for tensor in tensors if tensor.action != "keep"]
    roles = {role: [t for t in changed if t.role == role] for role in sorted({t.role for t in changed})}
    return Damage(
        engine=engine,
        bits_per_weight=totals.bits_per_weight,
        relative_error=finite(totals.relative_error),
        sqnr_db=totals.sqnr_db,
        roles={role: _role(mine) for role, mine in roles.items()},
        worst=tuple(_worst(tensor) for tensor in worst_of(tensors)),
        quality=None if quality is None else Judged(**{name: quality[name] for name in Judged.model_fields}),
    )


def _role(tensors: Sequence[ReportedTensor]) -> RoleDamage:
    found = stats_of(tensors)
    worst = worst_of(tensors)
    return RoleDamage(
        tensors=found.tensors,
        parameters=found.parameters,
        bits_per_weight=found.bits_per_weight,
        relative_error=finite(found.error.relative_error),
        sqnr_db=finite(found.error.sqnr_db),
        worst=_worst(worst[0]) if worst else None,
    )


def _worst(tensor: ReportedTensor) -> WorstTensor:
    return WorstTensor(
        name=tensor.name,
        role=tensor.role,
        relative_error=tensor.relative_error,
        sqnr_db=tensor.sqnr_db,
        max_error=tensor.max_error,
    )
