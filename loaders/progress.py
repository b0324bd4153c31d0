"""What a progress callback is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a piece of work has come.

    doing: the work: "quantizing", "verifying", "measuring", "evaluating NAME", ...
    done, total: in `counted`: bytes of the source, or tokens. An attempt that failed and starts again takes away what
    it had done.
    last: the tensor, or the unit of a job's work, that was finished last; empty before the first.
    seconds: since this work began.
    jobs: of a sweep, those that it is for, as its result names them ("quant=nf4"): one pass is for several.
    """

    doing: str
    done: int
    total: int
    counted: str
    last: str
    seconds: float
    jobs: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """The share that is done, from 0 to 1."""
        return min(1.0, max(0.0, self.done / max(1, self.total)))


OnProgress = Callable[[Progress], None]
