"""Sums that are the same bits in any order.

Adding and subtracting 1.5 x 2^12 rounds a float64 of magnitude under 2^11 to a multiple of 2^-40. Such values
add without any rounding error while the sum stays under 2^13, so neither the number of pools nor the order in
which they finish can show in a result. Weights are integers scaled by one power of two for the whole round,
so that they sum to at most 1 and the bound holds for any number of clients.
"""

from __future__ import annotations

import numpy as np

SHIFT = 1.5 * 2.0**12
LIMIT = 2.0**11


def on_grid(values: np.ndarray) -> np.ndarray:
    """Rounds float64 values, each under 2^11 in magnitude, to multiples of 2^-40 (in place)."""
    values += SHIFT
    values -= SHIFT
    return values


def weight_unit(total: int) -> float:
    """The power of two that scales integer weights summing to ``total`` to a sum of at most 1."""
    return 2.0 ** -max(0, int(total - 1).bit_length())


def fits(values: np.ndarray) -> bool:
    """Whether every value is finite and under 2^11 in magnitude: what :func:`on_grid` can round."""
    return bool(np.abs(values).max(initial=0.0) < LIMIT)  # NaN compares false
