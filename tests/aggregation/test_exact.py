"""Sums that are the same bits in any order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.aggregation.exact import LIMIT, fits, on_grid, weight_unit

values = st.floats(-2047, 2047, allow_nan=False, width=32)


@given(st.lists(values, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(numbers: list[float], random) -> None:  # type: ignore[no-untyped-def]
    unit = weight_unit(len(numbers))
    terms = [on_grid(np.array([number * unit])) for number in numbers]
    shuffled = random.sample(terms, len(terms))
    halves = [sum(shuffled[i::2], start=np.zeros(1)) for i in (0, 1)]
    assert sum(terms, start=np.zeros(1)).tobytes() == (halves[0] + halves[1]).tobytes()


@given(values)
def test_grid_is_two_to_the_minus_forty(number: float) -> None:
    rounded = float(on_grid(np.array([number]))[0])
    assert rounded == np.round(number * 2.0**40) / 2.0**40
    assert abs(rounded - number) <= 2.0**-41


@given(st.integers(1, 10**9))
def test_weight_unit_is_the_power_of_two_just_above(total: int) -> None:
    unit = weight_unit(total)
    assert total * unit <= 1 < 2 * total * unit


def test_what_does_not_fit() -> None:
    assert fits(np.array([LIMIT - 1, -1.0]))
    assert fits(np.zeros(0))
    assert not any(fits(np.array([0.0, bad])) for bad in (LIMIT, -LIMIT, np.nan, np.inf))
