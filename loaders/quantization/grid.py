"""The values that a group's stored scales allow, and how far from the nearest of them a weight may come back.

An encoder that takes the nearest code leaves |clip(w, low, high) - decoded| at no more than half the gap between codes,
whatever the weights are: a weight beyond the ends comes back as an end. So a single wrong code among millions stands
out by one gap. Only roundings are added to half a gap, and each is derived where a scheme makes its grid:
    - Scales and zeros are rounded to their stored dtype after codes were found with the unrounded ones. That is an
      error of u times themselves, or half of the dtype's least number, times the greatest code. It counts twice, since
      it moves both the ends and the decoded values.
    - The engine's arithmetic rounds, in float32 or in the weights' dtype: a share of the decoded value, `slope`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}  # u: the relative error of rounding to a dtype
LEAST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}  # a dtype's least number above zero
SMALL = 2.0**-20  # room for sixteen float32 roundings, relative
# What a cast before encoding adds to half a gap, relative and absolute: see `Grid.after_cast`.
CAST_SHARE, CAST_LEAST = 2.0**-7, 2.0**-24
TINY = 2.0**-125  # absolute room where float32 numbers are subnormal, and a relative bound does not hold
# Half of the gap between neighbouring codes is at most HALF + SLOPE * |value|. E2M1's half gaps are 0.25 up to 2, 0.5
# from 2 to 4, and 1 from 4 to 6. E4M3's are 2^-10 up to 2^-6, and from there on a sixteenth of the power of two below.
E2M1_HALF, E2M1_SLOPE = 0.25, 0.1875
E4M3_HALF, E4M3_SLOPE = 2.0**-10, 2.0**-4


@dataclass(frozen=True, slots=True)
class Grid:
    """The grids of groups of `group` consecutive weights: the least and greatest value of a code, and half a gap.

    Half a gap is `half` at zero, and grows by `slope` times the decoded magnitude. `low`, `high` and `half` are
    float32, one entry for each group.
    """

    group: int
    low: np.ndarray
    high: np.ndarray
    half: np.ndarray
    slope: float = SMALL

    def after_cast(self) -> Grid:
        """Return the grid for weights that were cast before they were encoded, which moves each by at most 2^-8 of it.

        A weight within the ends is at most |decoded| * (1 + slope) + half, so 2^-7 of each term covers its 2^-8, and
        2^-24 covers float16's subnormal numbers.
        """
        half = self.half * np.float32(1 + CAST_SHARE) + np.float32(CAST_LEAST)
        return replace(self, half=half, slope=self.slope * (1 + CAST_SHARE) + CAST_SHARE)

    def holds(self, x: np.ndarray, decoded: np.ndarray) -> bool:
        """Whether every decoded weight is one of the nearest. x: raw, as `kernel_input` gives it; both (n,)."""
        from loaders.quantization.kernels import nearest

        slope = np.float32(self.slope)
        return not nearest.is_off(x, decoded, self.group, self.low, self.high, self.half, slope)


def symmetric(group: int, scales: np.ndarray, top: float, half: float, slope: float, floor: float = 0.0) -> Grid:
    """Return the grid of a float code times a scale a group; code values end at -top and top.

    `half` and `slope` are those of the codes themselves; `floor` is added to half a gap, in units of weights.
    """
    with np.errstate(over="ignore"):  # an infinite end bounds nothing, and `measure` counts what decodes to infinity
        high = np.abs(scales) * np.float32(top)
        halves = np.abs(scales) * np.float32(half * (1 + SMALL)) + np.float32(TINY + floor)
    return Grid(group, -high, high, halves, slope)


@cache
def symmetric_terms(top: float, half: float, slope: float, is_cast: bool) -> tuple[np.float32, ...]:
    """Return what makes a `symmetric` grid of a scale s: s * top, s * half + floor, and slope: top, half, floor, slope.

    `is_cast` says that weights were cast before they were encoded: see `Grid.after_cast`.
    """
    one, none = (symmetric(1, np.array([scale], np.float32), top, half, slope) for scale in (1, 0))
    one, none = (one.after_cast(), none.after_cast()) if is_cast else (one, none)
    floor = none.half[0]
    return np.float32(top), one.half[0] - floor, floor, np.float32(one.slope)


@cache
def exact_terms(slope: float, is_cast: bool) -> tuple[np.float32, ...]:
    """Return what a cast makes of half a gap h and of the slope: h * growth + floor; growth, floor, slope.

    `is_cast` says that weights were cast before they were encoded; without it growth is 1 and floor is 0.
    """
    share, least = (CAST_SHARE, CAST_LEAST) if is_cast else (0.0, 0.0)
    return np.float32(1 + share), np.float32(least), np.float32(slope * (1 + share) + share)
