"""The values that a group's stored scales allow, and how far from the nearest of them a weight may come back.

An encoder that takes the nearest code leaves |clip(w, low, high) - decoded| at no more than half the gap between codes,
whatever the weights are: one that lies beyond the ends comes back as an end. So a single wrong code stands out, among
millions, by one gap. What is added to half a gap are roundings alone, each derived where a scheme makes its grid:
    - of scales and zeros to their stored dtype, after codes were found with unrounded ones: u of themselves, or half of
      the dtype's least number, times the greatest code. They move the ends, and what is decoded: twice.
    - of the engine's arithmetic, in float32 or in the weights' dtype: a share of the decoded value, `slope`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from loaders.quantization.kernels import nearest

ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}  # u: the relative error of rounding to a dtype
LEAST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}  # a dtype's least number above zero
SMALL = 2.0**-20  # a few roundings in float32
TINY = 2.0**-125  # the same where float32 has fewer digits
E2M1_HALF, E2M1_SLOPE = 0.25, 0.1875  # half of E2M1's gaps: 0.25 up to 2, 0.5 from 2 to 4, 1 from 4 to 6
E4M3_HALF, E4M3_SLOPE = 2.0**-10, 2.0**-4  # half of E4M3's gaps: 2^-10, and from 2^-6 on a sixteenth of a power of two


@dataclass(frozen=True, slots=True)
class Grid:
    """Groups of `group` weights that lie together: the ends of their codes' values, what half a gap is at zero, and
    how it grows with a value. Arrays are float32, an entry a group.
    """

    group: int
    low: np.ndarray
    high: np.ndarray
    half: np.ndarray
    slope: float = SMALL

    def after_cast(self) -> Grid:
        """For weights that were cast before they were encoded, which moves them by 2^-8 of themselves at most.

        A weight within the ends is no greater than its decoded value and what that may be off.
        """
        half = self.half * np.float32(1 + 2**-7) + np.float32(2.0**-24)
        return replace(self, half=half, slope=self.slope * (1 + 2**-7) + 2**-7)

    def holds(self, x: np.ndarray, decoded: np.ndarray) -> bool:
        """Whether every decoded weight is one of the nearest. x: raw, as kernels take it; both (n,)."""
        slope = np.float32(self.slope)
        return not nearest.is_off(x, decoded, self.group, self.low, self.high, self.half, slope)


def symmetric(group: int, scales: np.ndarray, top: float, half: float, slope: float, floor: float = 0.0) -> Grid:
    """Floats times a scale: codes' values end at `top` either way; `half` and `slope` are those of the codes."""
    with np.errstate(over="ignore"):
        high = np.abs(scales) * np.float32(top)
        halves = np.abs(scales) * np.float32(half * (1 + SMALL)) + np.float32(TINY + floor)
    return Grid(group, -high, high, halves, slope)
