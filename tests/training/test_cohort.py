"""Cohorts: how they form, and that a client's update never depends on its company."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.aggregation.nested import PartialSum, aggregate
from cluster_fl.data.partition import Shares
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.nesting.plan import State
from cluster_fl.population import Population
from cluster_fl.records import weights_sha256
from cluster_fl.timing.clock import Devices
from cluster_fl.training.cohort import Cohort, CohortResult, form
from cluster_fl.training.worker import Worker
from tests.tiny import LEVELS, tiny

ROUND = 1
ROUND_WEIGHT = 0.25


@pytest.fixture(scope="module", params=["batch", "per_level"])
def experiment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("tiny")
    return prepare(tiny(folder, "clients.count=40", f"model.norm={request.param}"))


@pytest.fixture(scope="module")
def state(experiment: Experiment) -> State:
    """Read-only, as arrays out of Ray's object store are."""
    state = experiment.initial_state()
    for array in state.values():
        array.flags.writeable = False
    return state


@pytest.fixture(scope="module")
def worker(experiment: Experiment) -> Worker:
    return hosting(experiment)


@pytest.fixture(scope="module")
def alone(experiment: Experiment, state: State, worker: Worker) -> dict[int, CohortResult]:
    """Each of a few clients of the middle level, trained on its own."""
    clients = np.flatnonzero(experiment.population.level_of == 2)[:4]
    return {int(c): cohort(2, (int(c),)).run(worker, state) for c in clients}


def hosting(experiment: Experiment, shares: Shares | None = None, *overrides: tuple[str, object]) -> Worker:
    config = copy.deepcopy(experiment.config)
    for key, value in overrides:
        setattr(config.train, key, value)
    shares = shares or experiment.population.shares
    return Worker(config, experiment.plan, experiment.dataset, shares, torch.device("cpu"))


def cohort(level: int, clients: tuple[int, ...], weights: tuple[float, ...] | None = None) -> Cohort:
    return Cohort(ROUND, level, clients, weights or (ROUND_WEIGHT,) * len(clients), work=1.0)


def bits(partial: PartialSum) -> dict[str, bytes]:
    return {name: (update + 0.0).tobytes() for name, update in partial.updates.items()}


def summed(partials: list[PartialSum]) -> dict[str, bytes]:
    return {
        n: sum((p.updates[n] for p in partials), start=np.zeros(())).tobytes() for n in partials[0].updates
    }


def with_train(shares: Shares, **rows: np.ndarray) -> Shares:
    """``shares`` with other training rows for some clients, given as c<number>."""
    train = tuple(rows.get(f"c{client}", own) for client, own in enumerate(shares.train))
    return dataclasses.replace(shares, train=train)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_company_does_not_show(
    experiment: Experiment, state: State, worker: Worker, alone: dict[int, CohortResult], data: st.DataObject
) -> None:
    clients = tuple(data.draw(st.lists(st.sampled_from(sorted(alone)), min_size=1, max_size=4, unique=True)))
    if data.draw(st.booleans(), label="the pool has trained another level before"):
        cohort(3, (0,)).run(worker, state)
    result = cohort(2, clients).run(worker, state)
    assert bits(result.partial) == summed([alone[c].partial for c in clients])
    assert result.report.clients == clients
    assert result.report.losses == tuple(alone[c].report.losses[0] for c in clients)
    assert result.report.steps == tuple(alone[c].report.steps[0] for c in clients)
    assert result.partial.weight == ROUND_WEIGHT * len(clients)
    assert all(any(update.any() for update in alone[c].partial.updates.values()) for c in clients)


def test_clients_rounds_and_seeds_train_differently(
    experiment: Experiment, state: State, worker: Worker, alone: dict[int, CohortResult]
) -> None:
    """The same rows, so that the order of the samples alone differs."""
    first, second = sorted(alone)[:2]
    rows = experiment.population.shares.train[first]
    twins = hosting(experiment, with_train(experiment.population.shares, **{f"c{second}": rows}))
    found = [
        bits(cohort(2, (first,)).run(twins, state).partial),
        bits(cohort(2, (second,)).run(twins, state).partial),
        bits(dataclasses.replace(cohort(2, (first,)), round=ROUND + 1).run(twins, state).partial),
    ]
    twins.config = dataclasses.replace(twins.config, seed=1)
    found.append(bits(cohort(2, (first,)).run(twins, state).partial))
    assert found[0] == bits(alone[first].partial)
    assert all(found[i] != found[j] for i in range(4) for j in range(i))


def test_the_state_is_never_written(experiment: Experiment, state: State, worker: Worker) -> None:
    before = weights_sha256(state)
    for level in range(1, LEVELS + 1):
        result = cohort(level, (0, 1)).run(worker, state)
        assert any(update.any() for update in result.partial.updates.values())
        assert weights_sha256(state) == before


@pytest.mark.parametrize("samples", [0, 1])
def test_a_client_without_a_batch_is_not_in_the_sum(
    experiment: Experiment, state: State, alone: dict[int, CohortResult], samples: int
) -> None:
    idle, busy = sorted(alone)[:2]
    shares = with_train(experiment.population.shares, **{f"c{idle}": np.arange(samples)})
    result = cohort(2, (idle, busy)).run(hosting(experiment, shares), state)
    assert bits(result.partial) == bits(alone[busy].partial)
    assert result.partial.weight == ROUND_WEIGHT
    assert (result.report.steps[0], result.report.losses[0], result.report.refused) == (0, 0.0, ())


@pytest.mark.parametrize("rate", [1e30, float("nan")])
def test_a_diverged_client_is_refused_and_named(experiment: Experiment, state: State, rate: float) -> None:
    result = cohort(3, (4, 7)).run(hosting(experiment, None, ("lr", rate)), state)
    assert result.report.refused == (4, 7)
    assert result.partial.weight == 0
    assert not any(update.any() for update in result.partial.updates.values())


def test_one_diverged_client_leaves_the_others_alone(
    experiment: Experiment, state: State, worker: Worker, alone: dict[int, CohortResult]
) -> None:
    bad, good = sorted(alone)[:2]

    def program(model, data, rows, round, generator):  # type: ignore[no-untyped-def]
        report = worker.program(model, data, rows, round, generator)
        if rows is worker.shares.train[bad]:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = float("inf")
        return report

    other = hosting(experiment)
    other.program = program
    result = cohort(2, (bad, good)).run(other, state)
    assert result.report.refused == (bad,)
    assert bits(result.partial) == bits(alone[good].partial)


@pytest.mark.parametrize("change", [("epochs", 0), ("lr", 0.0)])
def test_without_training_the_next_state_is_the_same(
    experiment: Experiment, state: State, change: tuple[str, object]
) -> None:
    other = hosting(experiment, None, change)
    results = [cohort(level, (0, 1)).run(other, state) for level in range(1, LEVELS + 1)]
    after = aggregate(experiment.plan, state, [result.partial for result in results])
    # Running statistics move with every forward, whatever the rate.
    moving = () if change[0] == "epochs" else ("running_mean", "running_var")
    assert all(after[n].tobytes() == state[n].tobytes() for n in state if not n.endswith(moving or ("?",)))


# How cohorts form.


def population(level_of: list[int], samples: list[int]) -> Population:
    levels = np.array(level_of)
    train = tuple(np.arange(count) for count in samples)
    empty = tuple(np.arange(0) for _ in samples)
    ones = np.ones(len(samples))
    return Population(Shares(train, empty, empty), levels, Devices(ones, ones, ones, 0.0))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_cohorts_split_the_participants(experiment: Experiment, data: st.DataObject) -> None:
    clients = data.draw(st.integers(1, 30), label="clients")
    level_of, samples = (
        data.draw(st.lists(st.integers(1, most), min_size=clients, max_size=clients))
        for most in (LEVELS, 500)
    )
    people = population(level_of, samples)
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, clients - 1), min_size=1))))
    size = data.draw(st.integers(1, 6), label="cohort_size")
    weighting = data.draw(st.sampled_from(["uniform", "samples"]))
    config = dataclasses.replace(
        experiment.config,
        train=dataclasses.replace(experiment.config.train, cohort_size=size),
        aggregation=dataclasses.replace(experiment.config.aggregation, weights=weighting),
    )
    cohorts = form(config, experiment.plan, people, ROUND, chosen)

    assert sorted(c for one in cohorts for c in one.clients) == chosen.tolist()
    assert all(one.round == ROUND for one in cohorts)
    assert [one.level for one in cohorts] == sorted(one.level for one in cohorts)
    for level in range(1, LEVELS + 1):
        own = [one for one in cohorts if one.level == level]
        expected = [int(c) for c in chosen if people.level_of[c] == level]
        assert [c for one in own for c in one.clients] == expected  # in client order, across cohorts too
        assert [len(one.clients) for one in own] == [
            min(size, len(expected) - start) for start in range(0, len(expected), size)
        ]
    assert all(one.work > 0 for one in cohorts)

    weight = {c: w for one in cohorts for c, w in zip(one.clients, one.weights, strict=True)}
    assert 0.5 < sum(weight.values()) <= 1
    share = {c: 1 if weighting == "uniform" else len(people.shares.train[c]) for c in weight}
    unit = weight[int(chosen[0])] / share[int(chosen[0])]
    assert all(weight[c] == share[c] * unit for c in weight)  # a power of two: the products are exact
    assert np.frexp(unit)[0] == 0.5


def test_work_is_samples_times_macs_times_epochs(experiment: Experiment) -> None:
    config = dataclasses.replace(
        experiment.config, train=dataclasses.replace(experiment.config.train, epochs=3, cohort_size=2)
    )
    people = population([1, 3, 1, 3, 3], [10, 20, 30, 40, 50])
    cohorts = form(config, experiment.plan, people, 0, np.arange(5))
    macs = [level.cost.macs for level in experiment.plan.levels]
    assert [one.clients for one in cohorts] == [(0, 2), (1, 3), (4,)]
    assert [one.work for one in cohorts] == [40 * 3 * macs[0], 60 * 3 * macs[2], 50 * 3 * macs[2]]


def test_nobody_with_samples_is_no_error(experiment: Experiment, tmp_path: Path) -> None:
    config = dataclasses.replace(
        experiment.config, aggregation=dataclasses.replace(experiment.config.aggregation, weights="samples")
    )
    cohorts = form(config, experiment.plan, population([1, 2], [0, 0]), 0, np.arange(2))
    assert [one.weights for one in cohorts] == [(0.0,), (0.0,)]
