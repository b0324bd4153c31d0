"""The sixteen values of NF4's and FP4's codes, as bitsandbytes has them, and the tables by which kernels find codes.

A plan needs the values, so that nothing here imports a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4 = (*_FP4, 0.0, *(-value for value in _FP4[1:]))
# rank -> code. FP4's is torch.argsort(FP4), with its two zeros (codes 0 and 8) in the order that torch gives them.
NF4_ORDER = tuple(range(16))
FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
VALUES = {"nf4": NF4, "fp4": FP4}
ORDERS = {"nf4": NF4_ORDER, "fp4": FP4_ORDER}


@dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """A sixteen-value code, and what finds codes by it.

    values: float32 (16,), by code. bounds: float32 (16,), the fifteen midpoints in rising order and a spare that is
    never exceeded. order: uint8 (16,), rank -> code. rows, directions, lowest, highest: the bounds among bfloat16 bits,
    see `_thresholds`; they hold for groups whose largest magnitude has bits in [lowest, highest].
    """

    name: str
    values: np.ndarray
    bounds: np.ndarray
    order: np.ndarray
    rows: np.ndarray
    directions: np.ndarray
    lowest: int
    highest: int


@cache
def table(name: str) -> Table:
    """Return the table called "nf4" or "fp4"."""
    values, order = np.array(VALUES[name], np.float32), np.array(ORDERS[name], np.uint8)
    ranked = values[order]
    bounds = ((ranked[:-1] + ranked[1:]) / np.float32(2)).astype(np.float32)
    # FP4 has a bound at zero, which tells the least positive bfloat16, 2^-133, from zero: its product with the inverse
    # of the largest magnitude must not round to zero, so that is at most 2^16. Without such a bound 2^125 will do.
    highest = 0x4780 if 0.0 in bounds else 0x7E00
    return Table(
        name=name,
        values=values,
        bounds=np.append(bounds, np.float32(3e38)).astype(np.float32),
        order=order,
        rows=_thresholds(bounds),
        directions=np.append(np.sign(bounds), 0).astype(np.int16),
        lowest=0x0D80,  # 2^-100, which keeps all thresholds far above the subnormal numbers, whose steps do not scale
        highest=highest,
    )


def _thresholds(bounds: np.ndarray) -> np.ndarray:
    """Find the bounds among bfloat16 bits: int16 (128, 16), a row for each mantissa of the group's largest magnitude.

    fl(x * inverse) rises with x, so that "above bound i" means exactly "above the last x whose product is not above
    it". bfloat16s sort as the integers of `thresholds.sortable` do, which are their bits with all but the sign flipped
    where the sign is set. Row m is computed for a largest magnitude of 1 + m/128. For another exponent all thresholds
    move by whole exponents, (exponent - 127) << 7, away from zero: `directions` holds their signs.
    """
    sortable = np.arange(-32768, 32768).astype(np.int16)
    bits = np.where(sortable < 0, sortable ^ 0x7FFF, sortable).astype(np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    near = np.abs(values) <= 2
    rows = np.full((128, 16), 0x7FFF, np.int16)
    for mantissa in range(128):
        inverse = np.float32(1) / np.float32(1 + mantissa / 128)
        last = np.searchsorted(values[near] * inverse, bounds, side="right") - 1
        rows[mantissa, :15] = sortable[near][last]
    return rows
