"""Task 1: budgets, levels, and who is at which."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.config import LevelsConfig
from cluster_fl.errors import UserError
from cluster_fl.nesting.levels import assign, cluster, ratios


def test_levels_of_the_released_code() -> None:
    """Seed 0, 100 clients: first five of each level, and the levels of the first sampled round."""
    level_of = assign(LevelsConfig(), 100, np.random.RandomState(0))
    first = [[26, 86, 2, 55, 75], [48, 6, 99, 82, 76], [91, 59, 0, 34, 28], [69, 20, 94, 72, 77]]
    for level, clients in enumerate(first, start=1):
        assert set(level_of[clients]) == {level}
    assert list(level_of[[18, 29, 64, 92, 72, 87, 5, 15, 12, 17]]) == [2, 3, 4, 1, 4, 4, 2, 2, 4, 2]


def test_ratios_halve_from_the_top() -> None:
    assert ratios(LevelsConfig(count=4)) == [0.125, 0.25, 0.5, 1.0]
    assert ratios(LevelsConfig(ratios=[0.3, 1.0])) == [0.3, 1.0]


def test_clustered_budgets_take_the_lowest_of_each_level() -> None:
    budgets = [0.11, 1.2, 0.5, 0.13, 0.26, 0.24, 0.55, 1.0]
    levels = LevelsConfig(count=4, budgets=budgets)
    assert ratios(levels) == [0.11, 0.24, 0.5, 1.0]
    assert list(assign(levels, 8, np.random.default_rng(0))) == [1, 4, 3, 1, 2, 2, 3, 4]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.01, 0.99), min_size=4, max_size=40, unique=True))
def test_no_client_gets_a_larger_budget_than_its_own(budgets: list[float]) -> None:
    levels = LevelsConfig(count=3, budgets=[*budgets, 1.0])
    try:
        level_of = cluster([*budgets, 1.0], 3)
    except UserError:
        return  # the top cluster was below 1, so its clients joined the middle one: allowed to leave none
    for budget, level in zip([*budgets, 1.0], level_of, strict=True):
        assert ratios(levels)[level - 1] <= budget


@given(st.integers(4, 200), st.integers(1, 4))
def test_everybody_has_a_level_and_shares_are_equal(clients: int, count: int) -> None:
    sizes = np.bincount(assign(LevelsConfig(count=count), clients, np.random.default_rng(1)))
    assert sizes[0] == 0
    assert sizes.sum() == clients
    assert sizes[1:].max() - sizes[1:].min() <= 1


@pytest.mark.parametrize(
    ("levels", "clients", "message"),
    [
        (LevelsConfig(), 3, r"clients\.count=3: level \d of 4 gets no client"),
        (LevelsConfig(shares=[0.5, 0.47, 0.03, 0.0]), 10, r"levels\.shares=.*level 3 of 4 gets no client"),
        (LevelsConfig(count=2, shares=[0.95, 0.05], order="falling"), 10, r"level 2 of 2 gets no client"),
        (LevelsConfig(count=3, budgets=[0.5, 1.0]), 2, r"levels\.count=3: .*only 2 different"),
    ],
)
def test_a_level_without_clients_is_refused(levels: LevelsConfig, clients: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        assign(levels, clients, np.random.default_rng(0))


THIRDS = [1 / 3] * 3


def test_falling_order_is_heterofls_fixed_mode() -> None:
    """100 clients at a rate of 1/3 each: 33 of the largest, 33, and the smallest level takes the other 34."""
    for shares in (None, THIRDS):
        levels = LevelsConfig(count=3, ratios=[0.25, 0.5, 1.0], shares=shares, order="falling")
        level_of = assign(levels, 100, np.random.default_rng(0))
        assert level_of.tolist() == [3] * 33 + [2] * 33 + [1] * 34


def test_rising_order_has_the_smallest_level_first() -> None:
    """Bounds are rounded: 100/3 and 200/3 are 33 and 67."""
    level_of = assign(LevelsConfig(count=3, shares=THIRDS, order="rising"), 100, np.random.default_rng(0))
    assert level_of.tolist() == [1] * 33 + [2] * 34 + [3] * 33


@given(
    st.sampled_from(["rising", "falling"]),
    st.integers(4, 200),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_order_by_number_takes_no_chance(order: str, clients: int, parts: list[int]) -> None:
    shares = [part / sum(parts) for part in parts]
    levels = LevelsConfig(count=len(parts), shares=shares, order=order)
    try:
        one, other = (assign(levels, clients, np.random.default_rng(seed)) for seed in (0, 1))
    except UserError:
        return  # a share of less than a client
    assert one.tolist() == other.tolist() == sorted(one, reverse=order == "falling")
    for level, share in enumerate(shares, start=1):
        off = np.sum(one == level) - share * clients
        most = len(shares) if order == "falling" and level == 1 else 1
        assert abs(off) <= most


def test_shuffled_sizes_are_those_of_the_shares() -> None:
    level_of = assign(LevelsConfig(count=3, shares=[0.5, 0.3, 0.2]), 10, np.random.default_rng(0))
    assert np.bincount(level_of).tolist() == [0, 5, 3, 2]
    other = assign(LevelsConfig(count=3, shares=[0.5, 0.3, 0.2]), 10, np.random.default_rng(1))
    assert level_of.tolist() != other.tolist()


@pytest.mark.parametrize("order", ["shuffled", "rising", "falling"])
@pytest.mark.parametrize("shares", [[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
def test_a_share_of_zero_is_a_level_without_clients(order: str, shares: list[float]) -> None:
    level_of = assign(LevelsConfig(count=3, shares=shares, order=order), 10, np.random.default_rng(0))
    assert np.bincount(level_of, minlength=4)[1:].tolist() == [round(10 * share) for share in shares]
