"""What a quantized tensor must satisfy to be handed on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loaders.quantization.scheme import Floored, Scheme
from loaders.stats import ErrorSums


@dataclass(frozen=True, slots=True)
class Gate:
    """What a tensor must satisfy to leave. `max_relative_error` tightens the scheme's own limit.

    `settings` is where whoever asked finds these settings, for messages.
    """

    allow_nonfinite: bool = False
    max_relative_error: float | None = None
    settings: str = "verify."

    def fault(self, name: str, error: ErrorSums, scheme: Scheme) -> str | None:
        """Why a tensor must not leave, or None."""
        if error.nonfinite and not self.allow_nonfinite:
            return (
                f"{name}: the source holds {error.nonfinite} NaN or infinite weights; mend it, or let them pass with"
                f" {self.settings}allow_nonfinite=true"
            )
        if error.nonfinite_decoded and not error.nonfinite:  # a NaN takes its whole group with it, in the engine too
            count = error.nonfinite_decoded
            return f"{name}: {count} finite weights come back as NaN or infinities; the dtype is too narrow"
        if error.wrong:
            return (
                f"{name}: a weight came back as not the nearest that its stored scale allows (a copy: not as it was);"
                " it was encoded or stored wrong: run the job again, and report it if that repeats"
            )
        limit = min(scheme.error_limit, self.max_relative_error or math.inf)
        if not error.relative_error <= limit and not self._is_floor(error, scheme):
            return f"{name}: relative error {error.relative_error:.4g}, at most {limit:.4g} allowed"
        return None

    def _is_floor(self, error: ErrorSums, scheme: Scheme) -> bool:
        """Whether weights are so small that the steps of the format's scales explain the error; no limit asked for."""
        if not isinstance(scheme, Floored) or (self.max_relative_error or math.inf) < scheme.error_limit:
            return False
        floor = scheme.error_floor * math.sqrt(error.numel)
        return math.sqrt(error.error2) <= scheme.error_limit * math.sqrt(error.source2) + floor
