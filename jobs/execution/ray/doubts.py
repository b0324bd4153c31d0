"""Units that failed, while their machines are asked whether they can do any unit at all."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.execution.cluster import UnitFailed
from jobs.execution.ray.deaths import Effort
from jobs.execution.ray.placement import Placement, Spot


class Doubts:
    """What is doubted: is it the unit that fails, or its machine, on which others would fail, too?"""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._open: list[tuple[Effort, Spot, UnitFailed]] = []

    def raised(self, effort: Effort, spot: Spot, outcome: UnitFailed) -> bool:
        """Whether a unit's failure does not count yet, since its machine is asked."""
        if not self._placement.doubt(spot.node):
            return False
        self._open.append((effort, spot, outcome))
        return True

    def resolved(self) -> Iterator[tuple[Effort, Spot, UnitFailed, bool]]:
        """Yield the failures whose machines have answered, and whether these are left out."""
        for each in list(self._open):
            effort, spot, outcome = each
            if (is_out := self._placement.is_out(spot.node)) is not None:
                self._open.remove(each)
                yield effort, spot, outcome, is_out
