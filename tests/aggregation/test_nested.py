"""The coverage mean against a brute-force element counter, and what must keep its bits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.aggregation.exact import weight_unit
from cluster_fl.aggregation.nested import CoverageMean, Mean, PartialSum, aggregate, moved
from cluster_fl.compose import compose
from cluster_fl.experiment import make_plan
from cluster_fl.nesting.extraction import read
from cluster_fl.nesting.plan import Holding, Plan, State
from tests.conftest import CONFIGS
from tests.tiny import scattered

DIGITS = ((1, 8, 8), 10)
LEVELS = 4


@pytest.fixture(scope="module", params=["batch", "per_level"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return make_plan(compose([CONFIGS / "quickstart.yaml"], [f"model.norm={request.param}"]), DIGITS)


@pytest.fixture(scope="module")
def state(plan: Plan) -> State:
    return plan.initial_state(read(plan.model.build()))


@dataclass(frozen=True)
class Client:
    """What one client sends; its weight is a whole number."""

    holding: Holding
    deltas: dict[str, np.ndarray]
    weight: int = 1
    coverage: dict[str, np.ndarray] = field(default_factory=dict)


def client(plan: Plan, state: State, level: int, seed: int, weight: int = 1) -> Client:
    """One of the plan's own submodels, and all that it holds."""
    return sending(plan.holding(level), state, np.random.default_rng(seed), weight)


def sending(holding: Holding, state: State, rng: np.random.Generator, weight: int = 1) -> Client:
    received = holding.gather(state)
    return Client(holding, {n: rng.normal(size=a.shape) * 0.01 for n, a in received.items()}, weight)


def elsewhere(plan: Plan, level: int, rng: np.random.Generator) -> Holding:
    """As many channels as the level has, but any."""
    submodel = scattered(plan.anatomy, plan.level(level).submodel, int(rng.integers(2**32)))
    return plan.holding(level, submodel)


def masks(deltas: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of some tensors some rows, some elements (with a weight each), all or nothing."""
    kinds: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
        "rows": lambda shape: rng.integers(0, 2, (*shape[:1], *(1 for _ in shape[1:]))).astype(np.float32),
        "elements": lambda shape: rng.choice([0.0, 0.25, 1.0], shape),
        "whole": lambda _: np.array(float(rng.integers(2))),
    }
    named = {name: rng.choice(["rows", "elements", "whole", "not named"]) for name in deltas}
    return {name: kinds[kind](deltas[name].shape) for name, kind in named.items() if kind in kinds}


def crowd(plan: Plan, state: State, seed: int) -> list[Client]:
    """A few clients of any level, channels, weight and coverage."""
    rng, clients = np.random.default_rng(seed), []
    for _ in range(rng.integers(1, 7)):
        level = int(rng.integers(1, LEVELS + 1))
        holding = plan.holding(level) if rng.random() < 0.5 else elsewhere(plan, level, rng)
        one = sending(holding, state, rng, int(rng.integers(1, 100)))
        clients.append(replace(one, coverage=masks(one.deltas, rng)))
    return clients


def unit_of(clients: Sequence[Client]) -> float:
    return weight_unit(sum(one.weight for one in clients))


def over(state: State, clients: Sequence[Client], unit: float) -> PartialSum:
    """One sum in the state's coordinates."""
    part = PartialSum.over(state, [key for one in clients for key in one.holding.keys.values()])
    assert all(part.add(one.holding, one.deltas, one.weight * unit, one.coverage) for one in clients)
    return part


def local(state: State, clients: Sequence[Client], unit: float) -> PartialSum:
    """One sum in the coordinates of the submodel that all share."""
    part = PartialSum.of(clients[0].holding, state)
    assert all(part.add(one.holding, one.deltas, one.weight * unit, one.coverage) for one in clients)
    return part


def mean_of(state: State, parts: Sequence[PartialSum]) -> Mean:
    mean = CoverageMean(state)
    for part in parts:
        mean.add(part)
    return mean.result()


def alone(state: State, clients: Sequence[Client]) -> list[PartialSum]:
    """A sum a client."""
    return [local(state, [one], unit_of(clients)) for one in clients]


def bits(mean: Mean) -> tuple[dict[str, bytes], dict[str, bytes], float, int]:
    arrays = ({key: a.tobytes() for key, a in part.items()} for part in (mean.updates, mean.weights))
    return *arrays, mean.total, mean.count  # type: ignore[return-value]


def element_counter(state: State, clients: Sequence[Client]) -> tuple[State, State]:
    """Element by element the sum of the weighted updates over the weights, and the weights; 0 for nobody."""
    total = {key: np.zeros(array.size) for key, array in state.items()}
    count = {key: np.zeros(array.size) for key, array in state.items()}
    for one in clients:
        for name, delta in one.deltas.items():
            key = one.holding.keys[name]
            places = np.arange(state[key].size).reshape(state[key].shape)[one.holding.where[name]]
            shares = np.broadcast_to(one.coverage.get(name, np.ones(())), delta.shape)
            np.add.at(total[key], places.ravel(), (one.weight * shares * delta).ravel())
            np.add.at(count[key], places.ravel(), (one.weight * shares).ravel())
    mean = {
        key: np.divide(t, count[key], out=np.zeros(t.size), where=count[key] > 0) for key, t in total.items()
    }
    return (
        {key: mean[key].reshape(array.shape) for key, array in state.items()},
        {key: count[key].reshape(array.shape) for key, array in state.items()},
    )


def equals_the_counter(state: State, clients: Sequence[Client], parts: Sequence[PartialSum]) -> None:
    found, (updates, weights) = mean_of(state, parts), element_counter(state, clients)
    held = {key for one in clients for key in one.holding.keys.values()}
    assert found.updates.keys() == found.weights.keys() == held
    unit = unit_of(clients)
    for key in held:
        np.testing.assert_array_equal(found.weights[key], weights[key] * unit)
        # The grid of 2^-40, which a small weight magnifies.
        np.testing.assert_allclose(found.updates[key], updates[key], rtol=2.0**-40, atol=2.0**-30)
    assert (found.total, found.count) == (sum(one.weight for one in clients) * unit, len(clients))


@pytest.mark.parametrize(
    ("levels", "weights"), [([1, 1, 2, 3, 3, 4], [1] * 6), ([1, 2, 4, 4], [5, 60, 7, 31])]
)
def test_equals_the_element_counter(plan: Plan, state: State, levels: list[int], weights: list[int]) -> None:
    clients = [client(plan, state, *of) for of in zip(levels, range(len(levels)), weights, strict=True)]
    equals_the_counter(state, clients, alone(state, clients))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_channels_and_coverage_equal_the_element_counter(plan: Plan, state: State, seed: int) -> None:
    clients = crowd(plan, state, seed)
    equals_the_counter(state, clients, [over(state, clients, unit_of(clients))])
    equals_the_counter(state, clients, alone(state, clients))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_neither_order_nor_company_nor_coordinates_show(
    plan: Plan, state: State, seed: int, data: st.DataObject
) -> None:
    """One sum for all, a sum for each client, and anything between."""
    clients = crowd(plan, state, seed)
    unit, expected = unit_of(clients), bits(mean_of(state, alone(state, clients)))
    shuffled = data.draw(st.permutations(clients))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(clients)), max_size=3)) | {0, len(clients)})
    groups = [shuffled[a:b] for a, b in itertools.pairwise(cuts)]
    parts = [over(state, group, unit) for group in groups]
    assert bits(mean_of(state, data.draw(st.permutations(parts)))) == expected


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), anywhere=st.booleans())
def test_a_shared_submodel_is_summed_in_its_own_coordinates(
    plan: Plan, state: State, seed: int, anywhere: bool
) -> None:
    rng = np.random.default_rng(seed)
    holding = elsewhere(plan, 2, rng) if anywhere else plan.holding(2)
    clients = [sending(holding, state, rng, int(rng.integers(1, 100))) for _ in range(3)]
    clients = [replace(one, coverage=masks(one.deltas, rng)) for one in clients]
    unit = unit_of(clients)
    here, there = local(state, clients, unit), over(state, clients, unit)
    assert bits(mean_of(state, [here])) == bits(mean_of(state, [there]))
    received = holding.gather(state)
    assert all(here.updates[holding.keys[name]].shape == array.shape for name, array in received.items())
    assert all(there.updates[key].shape == state[key].shape for key in there.updates)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_nobody_speaks_for_keeps_its_bits(plan: Plan, state: State, seed: int) -> None:
    """Also where those bits are -0.0."""
    clients = crowd(plan, state, seed)
    _, weights = element_counter(state, clients)
    zeros = {key: np.full_like(array, -0.0) for key, array in state.items()}
    for start in (state, zeros):
        found = aggregate(start, [over(state, clients, unit_of(clients))])
        for key, array in start.items():
            spoken = weights[key] > 0
            assert found[key].dtype == np.float32
            assert found[key][~spoken].tobytes() == array[~spoken].tobytes()
            assert (found[key] != array)[spoken].any() or not spoken.any()


def test_the_state_before_is_not_changed(plan: Plan, state: State) -> None:
    before = {key: array.tobytes() for key, array in state.items()}
    found = aggregate(state, alone(state, [client(plan, state, 1, 0)]))
    assert {key: array.tobytes() for key, array in state.items()} == before
    assert {key: array.tobytes() for key, array in found.items()} != before


def test_a_zero_mean_moves_nothing(plan: Plan, state: State) -> None:
    """Without training, and where updates cancel."""
    zeros = {key: np.full_like(array, -0.0) for key, array in state.items()}
    for start in (state, zeros):
        one = client(plan, start, 2, 0)
        back = replace(one, deltas={name: -delta for name, delta in one.deltas.items()})
        idle = [replace(one, deltas={name: 0 * delta for name, delta in one.deltas.items()})]
        for clients in (idle, [one, back]):
            found = aggregate(start, alone(start, clients))
            assert all(found[key].tobytes() == start[key].tobytes() for key in start)
    assert moved(state, {}) == state


def test_all_at_the_top_is_the_plain_mean(plan: Plan, state: State) -> None:
    clients = [client(plan, state, LEVELS, seed) for seed in range(5)]
    found = aggregate(state, alone(state, clients))
    for name, key in plan.holding(LEVELS).keys.items():
        mean = np.mean([one.deltas[name] for one in clients], axis=0)
        # One float32 rounding.
        np.testing.assert_allclose(found[key], state[key] + mean, rtol=2.0**-23, atol=2.0**-36)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2048.0])
@pytest.mark.parametrize("first", [local, over])
def test_a_diverged_update_is_refused_and_leaves_the_sum_alone(
    plan: Plan, state: State, bad: float, first: object
) -> None:
    good = client(plan, state, 1, 0)
    broken = {name: delta.copy() for name, delta in good.deltas.items()}
    list(broken.values())[-1].flat[-1] = bad
    part = first(state, [good], 0.5)  # type: ignore[operator]
    before = bits(mean_of(state, [part]))
    assert not part.add(good.holding, broken, 0.5, masks(broken, np.random.default_rng(0)))
    assert bits(mean_of(state, [part])) == before
    assert (part.total, part.count) == (0.5, 1)


def test_sums_keep_what_the_mean_divides(plan: Plan, state: State) -> None:
    clients = [client(plan, state, 1, seed) for seed in range(3)]
    mean = CoverageMean(state)
    for part in random.Random(0).sample(alone(state, clients), 3):
        mean.add(part)
    name, key = next(iter(plan.holding(1).keys.items()))
    where = plan.holding(1).where[name]
    expected = sum(one.deltas[name] for one in clients) * unit_of(clients)
    np.testing.assert_allclose(mean.sums()[key][where], expected, rtol=0, atol=2.0**-38)
