"""The coverage mean against a brute-force element counter, and what must keep its bits."""

from __future__ import annotations

import numpy as np
import pytest

from cluster_fl.aggregation.exact import weight_unit
from cluster_fl.aggregation.nested import PartialSum, aggregate
from cluster_fl.compose import compose
from cluster_fl.experiment import make_plan
from cluster_fl.nesting.extraction import read
from cluster_fl.nesting.plan import Plan, State
from tests.conftest import CONFIGS

DIGITS = ((1, 8, 8), 10)


@pytest.fixture(scope="module", params=["batch", "per_level"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return make_plan(compose([CONFIGS / "quickstart.yaml"], [f"model.norm={request.param}"]), DIGITS)


@pytest.fixture(scope="module")
def state(plan: Plan) -> State:
    return plan.initial_state(read(plan.model.build()))


def trained(plan: Plan, state: State, level: int, seed: int) -> State:
    rng = np.random.default_rng(seed)
    received = plan.received(state, level)
    return {n: (a + rng.normal(size=a.shape).astype(np.float32) * 0.01) for n, a in received.items()}


def run(
    plan: Plan, state: State, levels: list[int], order: list[int], weights: list[int] | None = None
) -> State:
    """Aggregates one client a level entry, with one partial sum each, in the given order."""
    weights = weights or [1] * len(levels)
    unit, sums = weight_unit(sum(weights)), []
    for client in order:
        received = plan.received(state, levels[client])
        part = PartialSum.empty(levels[client], {n: a.shape for n, a in received.items()})
        assert part.add(received, trained(plan, state, levels[client], client), weights[client] * unit)
        sums.append(part)
    return aggregate(plan, state, sums)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for one float32 rounding and the grid of 2^-40, which a small weight magnifies."""
    np.testing.assert_allclose(found, expected, rtol=2.0**-23, atol=2.0**-36)


def brute_force(plan: Plan, state: State, levels: list[int], weights: list[int]) -> State:
    """Element by element: sum of weighted values over the clients that hold it, over their weights."""
    total = {n: np.zeros(a.shape) for n, a in state.items()}
    count = {n: np.zeros(a.shape) for n, a in state.items()}
    for client, level in enumerate(levels):
        for name, array in trained(plan, state, level, client).items():
            key = plan.key(level, name)
            for position in np.ndindex(array.shape):
                total[key][position] += weights[client] * float(array[position])
                count[key][position] += weights[client]
    return {
        n: np.where(count[n] > 0, total[n] / np.maximum(count[n], 1), a).astype(np.float32)
        for n, a in state.items()
    }


@pytest.mark.parametrize(
    ("levels", "weights"), [([1, 1, 2, 3, 3, 4], [1] * 6), ([1, 2, 4, 4], [5, 60, 7, 31])]
)
def test_equals_the_element_counter(plan: Plan, state: State, levels: list[int], weights: list[int]) -> None:
    found = run(plan, state, levels, list(range(len(levels))), weights)
    expected = brute_force(plan, state, levels, weights)
    for name in state:
        close(found[name], expected[name])


def test_order_does_not_show(plan: Plan, state: State) -> None:
    levels = [1, 1, 2, 3, 3, 4, 4]
    one, other = (
        run(plan, state, levels, list(range(7)), [3, 1, 4, 1, 5, 9, 2]),
        run(plan, state, levels, [6, 2, 0, 5, 1, 4, 3], [3, 1, 4, 1, 5, 9, 2]),
    )
    assert all(one[name].tobytes() == other[name].tobytes() for name in state)


def test_untouched_elements_keep_their_bits(plan: Plan, state: State) -> None:
    levels = [1, 1, 2, 3, 3]
    found = run(plan, state, levels, list(range(5)))
    for name, array in state.items():
        touched = np.zeros(array.shape, dtype=bool)
        for level in set(levels):
            for own, where in plan.indices[level - 1].items():
                if plan.key(level, own) == name:
                    touched[(...,) if own in plan.owned else where] = True
        assert found[name][~touched].tobytes() == array[~touched].tobytes()
        assert (found[name][touched] != array[touched]).any() or not touched.any()


def test_without_training_the_state_keeps_its_bits(plan: Plan, state: State) -> None:
    sums = []
    for level in (1, 2, 4):
        received = plan.received(state, level)
        sums.append(PartialSum.empty(level, {n: a.shape for n, a in received.items()}))
        assert sums[-1].add(received, received, 0.25)
    found = aggregate(plan, state, sums)
    assert all(found[name].tobytes() == state[name].tobytes() for name in state)


def test_all_at_the_top_is_the_plain_mean(plan: Plan, state: State) -> None:
    levels = [4] * 5
    found = run(plan, state, levels, list(range(5)))
    for name in plan.received(state, 4):
        mean = np.mean([trained(plan, state, 4, c)[name].astype(np.float64) for c in range(5)], axis=0)
        close(found[plan.key(4, name)], mean.astype(np.float32))


def test_a_diverged_update_is_refused_and_leaves_the_sum_alone(plan: Plan, state: State) -> None:
    received = plan.received(state, 1)
    part = PartialSum.empty(1, {n: a.shape for n, a in received.items()})
    broken = {n: a.copy() for n, a in received.items()}
    next(iter(broken.values())).flat[0] = np.nan
    assert not part.add(received, broken, 1.0)
    assert part.weight == 0
    assert not any(update.any() for update in part.updates.values())
