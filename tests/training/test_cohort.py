"""Cohorts: how they form, and that a client's update never depends on its company."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.aggregation.nested import CoverageMean, PartialSum, aggregate
from cluster_fl.data.partition import Shares
from cluster_fl.errors import RunError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.plan import Assignment, State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.population import Population
from cluster_fl.records import weights_sha256
from cluster_fl.timing.availability import Always
from cluster_fl.timing.devices import Devices
from cluster_fl.training.cohort import Cohort, CohortResult, Member, form
from cluster_fl.training.program import Context, LocalProgram, Trained
from cluster_fl.training.worker import Worker
from tests.tiny import LEVELS, round_of, scattered, tiny, worker_of

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
    return worker_of(experiment)


@pytest.fixture(scope="module")
def alone(experiment: Experiment, state: State, worker: Worker) -> dict[int, CohortResult]:
    """Each of a few clients of the middle level, trained on its own."""
    clients = np.flatnonzero(experiment.plan.level_of == 2)[:4]
    return {int(c): cohort(experiment, 2, (int(c),)).run(worker, state) for c in clients}


def hosting(experiment: Experiment, shares: Shares | None = None, *overrides: tuple[str, object]) -> Worker:
    """A worker of the same experiment with other training options."""
    config = copy.deepcopy(experiment.config)
    for key, value in overrides:
        setattr(config.train, key, value)
    return worker_of(dataclasses.replace(experiment, config=config), shares)


def cohort(experiment: Experiment, level: int, clients: tuple[int, ...]) -> Cohort:
    submodel = experiment.plan.level(level).submodel
    members = tuple(Member(client, ROUND_WEIGHT, submodel) for client in clients)
    return Cohort(ROUND, 0, level, members, extra_weight=ROUND_WEIGHT, work=1.0)


def channels_of(experiment: Experiment, level: int, seed: int) -> Submodel:
    """As many channels as the level has, but any."""
    return scattered(experiment.plan.anatomy, experiment.plan.level(level).submodel, seed)


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
        cohort(experiment, 3, (0,)).run(worker, state)
    result = cohort(experiment, 2, clients).run(worker, state)
    assert bits(result.partial) == summed([alone[c].partial for c in clients])
    assert result.report.clients == clients
    assert result.report.losses == tuple(alone[c].report.losses[0] for c in clients)
    assert result.report.steps == tuple(alone[c].report.steps[0] for c in clients)
    assert result.partial.total == ROUND_WEIGHT * len(clients)
    assert all(any(update.any() for update in alone[c].partial.updates.values()) for c in clients)


def test_clients_rounds_and_seeds_train_differently(
    experiment: Experiment, state: State, worker: Worker, alone: dict[int, CohortResult]
) -> None:
    """The same rows, so that the order of the samples alone differs."""
    first, second = sorted(alone)[:2]
    rows = experiment.population.shares.train[first]
    twins = worker_of(experiment, with_train(experiment.population.shares, **{f"c{second}": rows}))
    found = [
        bits(cohort(experiment, 2, (first,)).run(twins, state).partial),
        bits(cohort(experiment, 2, (second,)).run(twins, state).partial),
        bits(dataclasses.replace(cohort(experiment, 2, (first,)), round=ROUND + 1).run(twins, state).partial),
    ]
    twins.config = dataclasses.replace(twins.config, seed=1)
    found.append(bits(cohort(experiment, 2, (first,)).run(twins, state).partial))
    assert found[0] == bits(alone[first].partial)
    assert all(found[i] != found[j] for i in range(4) for j in range(i))


def test_the_state_is_never_written(experiment: Experiment, state: State, worker: Worker) -> None:
    before = weights_sha256(state)
    for level in range(1, LEVELS + 1):
        result = cohort(experiment, level, (0, 1)).run(worker, state)
        assert any(update.any() for update in result.partial.updates.values())
        assert weights_sha256(state) == before


@pytest.mark.parametrize("samples", [0, 1])
def test_a_client_without_a_batch_is_not_in_the_sum(
    experiment: Experiment, state: State, alone: dict[int, CohortResult], samples: int
) -> None:
    idle, busy = sorted(alone)[:2]
    shares = with_train(experiment.population.shares, **{f"c{idle}": np.arange(samples)})
    result = cohort(experiment, 2, (idle, busy)).run(worker_of(experiment, shares), state)
    assert bits(result.partial) == bits(alone[busy].partial)
    assert result.partial.total == ROUND_WEIGHT
    assert (result.report.steps[0], result.report.losses[0], result.report.refused) == (0, 0.0, ())


@pytest.mark.parametrize("rate", [1e30, float("nan")])
def test_a_diverged_client_is_refused_and_named(experiment: Experiment, state: State, rate: float) -> None:
    result = cohort(experiment, 3, (4, 7)).run(hosting(experiment, None, ("lr", rate)), state)
    assert result.report.refused == (4, 7)
    assert result.partial.total == 0
    assert not any(update.any() for update in result.partial.updates.values())


def test_one_diverged_client_leaves_the_others_alone(
    experiment: Experiment, state: State, worker: Worker, alone: dict[int, CohortResult]
) -> None:
    bad, good = sorted(alone)[:2]

    class Breaks(LocalProgram):
        def train(self, model: Layered, context: Context) -> Trained:
            done = worker.program.train(model, context)
            if context.client == bad:
                with torch.no_grad():
                    next(model.parameters()).view(-1)[0] = float("inf")
            return done

    other = worker_of(experiment)
    other.program = Breaks()
    result = cohort(experiment, 2, (bad, good)).run(other, state)
    assert result.report.refused == (bad,)
    assert bits(result.partial) == bits(alone[good].partial)


def test_what_a_clients_training_raises_names_the_client(experiment: Experiment, state: State) -> None:
    class Raises(LocalProgram):
        def train(self, model: Layered, context: Context) -> Trained:
            if context.client == 7:
                raise ValueError("one line\nand another")
            return experiment.program.train(model, context)

    worker = worker_of(experiment)
    worker.program = Raises()
    told = "^round 1: training of client 7 failed: ValueError: one line and another$"
    with pytest.raises(RunError, match=told):
        cohort(experiment, 3, (4, 7)).run(worker, state)


@pytest.mark.parametrize("change", [("epochs", 0), ("lr", 0.0)])
def test_without_training_the_next_state_is_the_same(
    experiment: Experiment, state: State, change: tuple[str, object]
) -> None:
    other = hosting(experiment, None, change)
    results = [cohort(experiment, level, (0, 1)).run(other, state) for level in range(1, LEVELS + 1)]
    after = aggregate(state, [result.partial for result in results])
    # Running statistics move with every forward, whatever the rate.
    moving = () if change[0] == "epochs" else ("running_mean", "running_var")
    assert all(after[n].tobytes() == state[n].tobytes() for n in state if not n.endswith(moving or ("?",)))


def test_members_may_hold_different_channels(experiment: Experiment, state: State, worker: Worker) -> None:
    """Their common sum is that of sums of their own."""
    own = cohort(experiment, 2, (0, 1, 2))
    members = tuple(
        dataclasses.replace(member, submodel=channels_of(experiment, 2, member.client))
        for member in own.members
    )
    together, separate = CoverageMean(state), CoverageMean(state)
    result = dataclasses.replace(own, members=members).run(worker, state)
    together.add(result.partial)
    assert not result.partial.local
    for member in members:
        part = dataclasses.replace(own, members=(member,)).run(worker, state).partial
        assert part.local
        separate.add(part)
    one, other = together.result(), separate.result()
    assert {key: a.tobytes() for key, a in one.updates.items()} == {
        key: a.tobytes() for key, a in other.updates.items()
    }
    assert (one.total, one.count) == (other.total, other.count) == (3 * ROUND_WEIGHT, 3)
    assert any(((a > 0) & (a < one.total)).any() for a in one.weights.values())  # some hold what others lack


def test_a_client_trains_the_channels_that_it_holds(
    experiment: Experiment, state: State, worker: Worker
) -> None:
    submodel = channels_of(experiment, 1, 5)
    own = dataclasses.replace(cohort(experiment, 1, (0,)), members=(Member(0, ROUND_WEIGHT, submodel),))
    after = aggregate(state, [own.run(worker, state).partial])
    holding = experiment.plan.holding(1, submodel)
    moved = dict.fromkeys(state, False) | {
        key: bool((after[key][holding.where[name]] != state[key][holding.where[name]]).any())
        for name, key in holding.keys.items()
    }
    assert all(moved[key] for key in holding.keys.values())
    for name, key in holding.keys.items():
        elsewhere = np.ones(state[key].shape, dtype=bool)
        elsewhere[holding.where[name]] = False
        assert after[key][elsewhere].tobytes() == state[key][elsewhere].tobytes()
    assert all(after[key] is state[key] for key in state.keys() - set(holding.keys.values()))


def test_lower_levels_own_tensors_are_trained_with(experiment: Experiment) -> None:
    """FjORD: what is held but not in the module comes from the program; silence about it is no update."""
    levels = tuple(dataclasses.replace(v, also=tuple(range(1, v.number))) for v in experiment.plan.levels)
    made = dataclasses.replace(experiment, plan=dataclasses.replace(experiment.plan, levels=levels))
    start, inner = made.initial_state(), made.program

    class Trains(LocalProgram):
        def train(self, model: Layered, context: Context) -> Trained:
            also = {
                name: a + np.float32(0.5)
                for name, a in context.received.items()
                if name.startswith("level.1/")
            }
            return dataclasses.replace(inner.train(model, context), also=also)

    worker = worker_of(made)
    worker.program = Trains()
    after = aggregate(start, [cohort(made, 3, (0, 1)).run(worker, start).partial])
    lower = {key for key in start if key.startswith(("level.1/", "level.2/"))}
    assert bool(lower) == (experiment.plan.model.norm == "per_level")
    for key in lower:
        moved = np.float32(0.5 if key.startswith("level.1/") else 0.0)
        np.testing.assert_array_equal(after[key], start[key] + moved)


def test_updates_are_kept_until_another_round_keeps_some(
    experiment: Experiment, state: State, alone: dict[int, CohortResult]
) -> None:
    fresh, clients = worker_of(experiment), tuple(sorted(alone)[:2])
    keeping = dataclasses.replace(cohort(experiment, 2, clients), keep=True)
    partial = keeping.run(fresh, state).partial
    kept = fresh.kept(ROUND, 0)
    assert keeping.updates(fresh, state) is kept
    assert [update.client for update in kept] == list(clients)
    again = PartialSum.of(kept[0].holding, state)
    assert all(again.add(u.holding, u.deltas, u.weight, u.coverage) for u in kept)
    assert bits(again) == bits(partial)
    dataclasses.replace(keeping, round=ROUND + 1).run(fresh, state)
    assert fresh.kept(ROUND, 0) is None
    assert fresh.kept(ROUND + 1, 0) is not None
    cohort(experiment, 2, clients).run(fresh, state)  # one that keeps nothing
    assert fresh.kept(ROUND + 1, 0) is not None


# How cohorts form.


def population(samples: list[int]) -> Population:
    train = tuple(np.arange(count) for count in samples)
    empty = tuple(np.arange(0) for _ in samples)
    ones = np.ones(len(samples), dtype=np.int64)
    devices = Devices(*[ones.astype(np.float64)] * 6)
    everybody = Always(len(samples))
    return Population(Shares(train, empty, empty), np.array(samples), ones, ones, devices, everybody)


def formed(
    experiment: Experiment,
    people: Population,
    assignments: list[Assignment],
    keep: bool = False,
    **train: Any,
) -> list[Cohort]:
    config = dataclasses.replace(
        experiment.config, train=dataclasses.replace(experiment.config.train, **train)
    )
    round = dataclasses.replace(round_of(experiment, number=ROUND), config=config, population=people)
    return form(round, assignments, experiment.program, keep)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_cohorts_split_the_participants(experiment: Experiment, data: st.DataObject) -> None:
    """By level and shape, then in client order, in chunks."""
    clients = data.draw(st.integers(1, 30), label="clients")
    people = population(data.draw(st.lists(st.integers(1, 500), min_size=clients, max_size=clients)))
    chosen = sorted(data.draw(st.sets(st.integers(0, clients - 1), min_size=1)))
    size = data.draw(st.integers(1, 6), label="cohort_size")
    weighting = data.draw(st.sampled_from(["uniform", "samples"]))
    plan, config = experiment.plan, experiment.config
    # Of a level's size, of other channels in the same number, or of the smallest level's size.
    kinds = [(level, plan.level(at).submodel) for level in (1, 2, 3) for at in {1, level}]
    kinds += [(2, channels_of(experiment, 2, seed)) for seed in range(2)]
    assignments = [Assignment(client, *data.draw(st.sampled_from(kinds))) for client in chosen]
    config = dataclasses.replace(
        config, aggregation=dataclasses.replace(config.aggregation, weights=weighting)
    )
    cohorts = formed(dataclasses.replace(experiment, config=config), people, assignments, cohort_size=size)

    members = {member.client: (one.level, member.submodel) for one in cohorts for member in one.members}
    assert members == {a.client: (a.level, a.submodel) for a in assignments}
    assert sum(len(one.members) for one in cohorts) == len(chosen)
    assert [one.number for one in cohorts] == list(range(len(cohorts)))
    assert all((one.round, one.home, one.keep) == (ROUND, (ROUND, one.number), False) for one in cohorts)
    assert [one.level for one in cohorts] == sorted(one.level for one in cohorts)
    for level, shape in {(a.level, a.submodel.shape) for a in assignments}:
        own = [one for one in cohorts if (one.level, one.members[0].submodel.shape) == (level, shape)]
        expected = [a.client for a in assignments if (a.level, a.submodel.shape) == (level, shape)]
        assert [c for one in own for c in one.clients] == expected  # in client order, across cohorts too
        assert [len(one.clients) for one in own] == [
            min(size, len(expected) - start) for start in range(0, len(expected), size)
        ]
    assert all(one.work > 0 for one in cohorts)

    weight = {member.client: member.weight for one in cohorts for member in one.members}
    assert 0.5 < sum(weight.values()) <= 1
    share = {c: 1 if weighting == "uniform" else len(people.shares.train[c]) for c in weight}
    unit = weight[chosen[0]] / share[chosen[0]]
    assert all(weight[c] == share[c] * unit for c in weight)  # a power of two: the products are exact
    assert np.frexp(unit)[0] == 0.5
    (extra,) = {one.extra_weight for one in cohorts}
    assert np.frexp(extra)[0] == 0.5
    assert 0.5 < extra * len(chosen) <= 1


def by_level(experiment: Experiment, levels: list[int]) -> list[Assignment]:
    return [Assignment(c, level, experiment.plan.level(level).submodel) for c, level in enumerate(levels)]


def test_work_is_samples_times_macs_times_epochs(experiment: Experiment) -> None:
    people, assignments = population([10, 20, 30, 40, 50]), by_level(experiment, [1, 3, 1, 3, 3])
    cohorts = formed(experiment, people, assignments, epochs=3, cohort_size=2)
    macs = [level.cost.macs for level in experiment.plan.levels]
    assert [one.clients for one in cohorts] == [(0, 2), (1, 3), (4,)]
    assert [one.work for one in cohorts] == [40 * 3 * macs[0], 60 * 3 * macs[2], 50 * 3 * macs[2]]


def test_only_who_keeps_something_is_handed_it(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    round = dataclasses.replace(
        round_of(experiment), personal=lambda client: {"own": np.full(1, client, np.float32)}
    )
    assignments = by_level(experiment, [1, 2])
    for keeps, expected in ((False, [{}, {}]), (True, [{"own": [0.0]}, {"own": [1.0]}])):
        monkeypatch.setattr(type(experiment.program), "keeps_state", keeps)
        cohorts = form(round, assignments, experiment.program, keep=True)
        handed = [member.personal for one in cohorts for member in one.members]
        assert [{name: a.tolist() for name, a in own.items()} for own in handed] == expected
        assert all(one.keep for one in cohorts)


def test_nobody_with_samples_is_no_error(experiment: Experiment) -> None:
    config = dataclasses.replace(
        experiment.config, aggregation=dataclasses.replace(experiment.config.aggregation, weights="samples")
    )
    none = dataclasses.replace(experiment, config=config)
    cohorts = formed(none, population([0, 0]), by_level(experiment, [1, 2]))
    assert [[member.weight for member in one.members] for one in cohorts] == [[0.0], [0.0]]
