"""The gate that every quantized tensor must pass before it is published or handed to a caller."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loaders.quantization.scheme import Floored, Scheme, error_limit
from loaders.stats import ErrorSums


@dataclass(frozen=True, slots=True)
class Gate:
    """The limits on a tensor's error. `max_relative_error` tightens the scheme's own limit, and never loosens it.

    `settings` is the prefix under which the caller finds these settings; messages name them with it.
    """

    allow_nonfinite: bool = False
    max_relative_error: float | None = None
    settings: str = "verify."

    def fault(self, name: str, error: ErrorSums, scheme: Scheme) -> str | None:
        """Say why a tensor must not pass, or return None."""
        if error.nonfinite and not self.allow_nonfinite:
            yes = "true" if self.settings else "True"  # as a job's setting has it, and as Python has it
            return (
                f"{name}: the source holds {error.nonfinite} NaN or infinite weights; mend it, or let them pass with"
                f" {self.settings}allow_nonfinite={yes}"
            )
        # Where the source itself holds a NaN, its whole group may decode to NaN, in the engine too: that is no fault.
        if error.nonfinite_decoded and not error.nonfinite:
            count = error.nonfinite_decoded
            return f"{name}: {count} finite weights come back as NaN or infinities; the dtype is too narrow"
        if error.wrong:
            return (
                f"{name}: a weight came back as not the nearest that its stored scale allows (a copy: not as it was);"
                " it was encoded or stored wrong: run the job again, and report it if that repeats"
            )
        limit = min(error_limit(scheme), self.max_relative_error or math.inf)
        # `not <=` rather than `>`, so that a NaN fails.
        if not error.relative_error <= limit and not self._is_floor(error, scheme):
            return f"{name}: relative error {error.relative_error:.4g}, at most {limit:.4g} allowed"
        return None

    def _is_floor(self, error: ErrorSums, scheme: Scheme) -> bool:
        """Whether the weights are so small that the least step of the format's scales explains their error.

        A limit that the caller set below the scheme's is meant as it is: then nothing is excused.
        """
        if not isinstance(scheme, Floored) or (self.max_relative_error or math.inf) < scheme.error_limit:
            return False
        floor = scheme.error_floor * math.sqrt(error.numel)
        return math.sqrt(error.error2) <= scheme.error_limit * math.sqrt(error.source2) + floor
