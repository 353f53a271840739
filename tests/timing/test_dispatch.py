"""The clock of a run: every participant's own submodel, samples and device, by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.assignment import Planned, window
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.cost import count
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.plan import Level, State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.rounds import Round
from cluster_fl.seeding import Purpose
from cluster_fl.timing import draws, load, stragglers, tables
from cluster_fl.timing.attempts import Attempts
from cluster_fl.timing.availability import Always, Availability
from cluster_fl.timing.devices import Devices
from cluster_fl.timing.dispatch import Clock, first_half
from cluster_fl.timing.schema import (
    AvailabilityConfig,
    LoadConfig,
    PolicyConfig,
    StragglersConfig,
    TimeConfig,
)
from cluster_fl.timing.traces import Traces
from cluster_fl.training.own import pack
from cluster_fl.training.program import Context, Effort, LocalProgram, Trained
from tests.methods.common import small
from tests.tiny import LEVELS, round_of, tiny

CLIENTS, EPOCHS = 8, 3
LATENCY, FLOPS, DOWN, UP = 0.5, 4e6, 1e5, 5e4
EVERYONE = np.arange(CLIENTS)
NOBODY = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Client c is c + 1 times as fast as client 0, and has its own number of samples."""
    made = prepare(tiny(tmp_path_factory.mktemp("tiny"), f"train.epochs={EPOCHS}"))
    speeds = EVERYONE + 1.0
    free = np.full(CLIENTS, np.inf)
    devices = Devices(
        FLOPS * speeds, DOWN * speeds, UP * speeds, np.full(CLIENTS, LATENCY), free, memory_bandwidth=free
    )
    population = dataclasses.replace(made.population, devices=devices, samples=100 + 10 * EVERYONE[::-1])
    return dataclasses.replace(made, population=population)


class Costs(LocalProgram):
    """Nothing but an effort."""

    def effort(self, level: Level) -> Effort:
        return Effort(compute=1.5, down=2.0, up=0.5)

    def train(self, model: Layered, context: Context) -> Trained:
        raise AssertionError("nothing is trained here")


def clock(experiment: Experiment, epochs: int = EPOCHS, **time: Any) -> Clock:
    """Its clock with other sections of ``time``."""
    config = dataclasses.replace(
        experiment.config,
        time=TimeConfig(**time),
        train=dataclasses.replace(experiment.config.train, epochs=epochs),
    )
    return Clock(
        config, experiment.plan, experiment.population, Costs(), experiment.allocation, experiment.rule
    )


def view(made: Clock, number: int = 0, state: State | None = None) -> Round:
    """A round of which the clock needs no weights."""
    return Round(number, made.config, made.plan, made.population, state or {}, {}, lambda _: {})


def attempts(
    made: Clock,
    clients: Iterable[int] = EVERYONE,
    number: int = 0,
    start: float = 0.0,
    deadline: float = np.inf,
) -> Attempts:
    who = np.array(list(clients), dtype=np.int64)
    return made.dispatch(view(made, number)).attempts(number, who, start, deadline)


def parts(made: Clock, client: int, level: int, epochs: int | None = None) -> tuple[float, float, float]:
    """Seconds of download, compute and upload on an undisturbed device.

    3 passes of 2 operations a multiply-accumulate, 8 bits a byte, and what the program's effort says.
    """
    speed, own = client + 1, made.plan.level(level).cost
    samples = int(made.population.samples[client]) * (made.config.train.epochs if epochs is None else epochs)
    return (
        LATENCY / 2 + 8 * 2 * own.bytes / (DOWN * speed),
        6 * 1.5 * own.macs * samples / (FLOPS * speed),
        LATENCY / 2 + 8 * int(0.5 * own.bytes) / (UP * speed),
    )


def durations(found: Attempts) -> list[tuple[float, float, float]]:
    """Seconds of download, compute and upload."""
    moments = np.stack([found.start, found.downloaded, found.computed, found.finish])
    return [tuple(row) for row in np.diff(moments, axis=0).T.tolist()]


def same(found: Attempts, expected: Attempts) -> bool:
    """Bit for bit."""
    mine, theirs = found.columns(), expected.columns()
    return all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)


def close(expected: Iterable[Iterable[float]]) -> Any:
    return [pytest.approx(tuple(one), rel=1e-9) for one in expected]


# Undisturbed.


@pytest.mark.parametrize("start", [0.0, 12345.0])
def test_a_round_by_hand(experiment: Experiment, start: float) -> None:
    made, clients = clock(experiment), [0, 3, 4, 7]
    found = attempts(made, clients, number=5, start=start)
    levels = made.plan.level_of[clients].tolist()
    assert len(set(levels)) > 1
    assert found.client.tolist() == clients
    assert found.level.tolist() == found.first.tolist() == levels
    assert (set(found.version.tolist()), set(found.epochs.tolist())) == ({5}, {EPOCHS})
    assert found.start.tolist() == [start] * 4
    assert durations(found) == close(parts(made, *who) for who in zip(clients, levels, strict=True))
    assert found.down.tolist() == [2 * made.plan.level(level).cost.bytes for level in levels]
    assert found.up.tolist() == [made.plan.level(level).cost.bytes // 2 for level in levels]
    assert np.isinf(found.lost).all()
    assert (found.end == found.finish).all()


def test_the_level_that_is_trained_decides_not_the_clients_own(experiment: Experiment) -> None:
    made = dataclasses.replace(
        clock(experiment), allocation=lambda round: np.full(len(round.participants), 3)
    )
    assert (made.plan.level_of < 3).any()
    assert durations(attempts(made)) == close(parts(made, client, 3) for client in range(CLIENTS))


def test_nobody_takes_no_time(experiment: Experiment) -> None:
    """As an asynchronous policy asks where nobody can start."""
    disturbed: dict[str, Any] = {"stragglers": StragglersConfig("pareto"), "load": LoadConfig([0.0, 0.5])}
    for time in ({}, disturbed):
        found = attempts(clock(experiment, dropout=0.5, **time), [])
        assert same(found, Attempts.none())


def test_without_epochs_clients_only_send(experiment: Experiment) -> None:
    for late in ("drop", "partial", "smaller"):
        found = attempts(clock(experiment, epochs=0, policy=PolicyConfig(late=late)), deadline=1e6)
        assert (found.computed == found.downloaded).all()
        assert found.epochs.tolist() == [0] * CLIENTS


def test_memory_limits_the_level(experiment: Experiment) -> None:
    largest = np.array([1, 2, 3, 1, 2, 3, 1, 2])
    limited = dataclasses.replace(
        experiment, population=dataclasses.replace(experiment.population, largest=largest)
    )
    made = dataclasses.replace(clock(limited), allocation=lambda round: np.full(len(round.participants), 2))
    found = attempts(made, [1, 2, 3, 5])
    assert found.level.tolist() == [2, 2, 1, 2]
    own = np.minimum(made.plan.level_of, largest)
    assert (own != made.plan.level_of).any()
    seconds = [sum(parts(made, client, int(own[client]))) for client in range(CLIENTS)]
    assert made.fastest_first.tolist() == np.argsort(seconds).tolist()


# Other work.


SHARES = [0.0, 0.5, 0.75]


@pytest.mark.parametrize("epochs", [1, EPOCHS])
def test_a_busy_device_computes_at_what_is_left(experiment: Experiment, epochs: int) -> None:
    own, seen = LoadConfig(SHARES, stay=0.5), set()
    made = clock(experiment, epochs, load=own)
    for number in range(3):
        found = attempts(made, number=number)
        busy = load.load(own, made.config.seed, EVERYONE, number)
        expected = []
        for client in range(CLIENTS):
            down, compute, up = parts(made, client, int(made.plan.level_of[client]))
            expected.append((down, compute / (1 - busy[client]), up))
        assert durations(found) == close(expected)
        seen |= set(busy.tolist())
    assert seen == set(SHARES)


def halves(made: Clock, number: int) -> tuple[np.ndarray, np.ndarray]:
    own, seed = made.config.time.load, made.config.seed
    busy, later = (load.load(own, seed, EVERYONE, number, half) for half in (0, 1))
    return busy, later


@pytest.mark.parametrize(("epochs", "before"), [(1, 1 / 2), (2, 1 / 2), (3, 2 / 3), (4, 1 / 2), (5, 3 / 5)])
def test_a_load_that_moves_in_mid_round(experiment: Experiment, epochs: int, before: float) -> None:
    """The middle is between two epochs; of a single one it is its own."""
    made, changed = clock(experiment, epochs, load=LoadConfig(SHARES, stay=0.5, mid_round=True)), 0
    for number in range(3):
        busy, later = halves(made, number)
        expected = []
        for client in range(CLIENTS):
            down, compute, up = parts(made, client, int(made.plan.level_of[client]))
            slower = before / (1 - busy[client]) + (1 - before) / (1 - later[client])
            expected.append((down, compute * slower, up))
        found = attempts(made, number=number)
        assert durations(found) == close(expected)
        assert found.level.tolist() == found.first.tolist() == made.plan.level_of.tolist()
        changed += int(np.count_nonzero(busy != later))
    assert changed


SWITCH = PolicyConfig(switch=True)


@pytest.mark.parametrize(("epochs", "first"), [(2, 1), (3, 2), (5, 3)])
def test_who_gets_busier_goes_on_with_the_next_smaller_level(
    experiment: Experiment, epochs: int, first: int
) -> None:
    """It has downloaded the larger one and sends the smaller one."""
    made = clock(experiment, epochs, load=LoadConfig(SHARES, stay=0.2, mid_round=True), policy=SWITCH)
    assert first_half(epochs) == first
    fallen = set()
    for number in range(6):
        busy, later = halves(made, number)
        found, expected, levels = attempts(made, number=number), [], []
        for client in range(CLIENTS):
            own = int(made.plan.level_of[client])
            last = own - 1 if later[client] > busy[client] and own > 1 else own
            before = parts(made, client, own, first)[1] / (1 - busy[client])
            after = parts(made, client, last, epochs - first)[1] / (1 - later[client])
            expected.append((parts(made, client, own)[0], before + after, parts(made, client, last)[2]))
            levels.append(last)
            fallen.add((own, last, bool(later[client] > busy[client])))
        assert durations(found) == close(expected)
        assert found.level.tolist() == levels
        assert found.first.tolist() == made.plan.level_of.tolist()
        assert found.down.tolist() == [2 * made.plan.level(int(v)).cost.bytes for v in found.first]
        assert found.up.tolist() == [made.plan.level(v).cost.bytes // 2 for v in levels]
    assert {(3, 2, True), (2, 1, True), (1, 1, True), (3, 3, False)} <= fallen


def test_a_single_epoch_is_not_divided(experiment: Experiment) -> None:
    busier = LoadConfig(SHARES, stay=0.0, mid_round=True)
    found = attempts(clock(experiment, 1, load=busier, policy=SWITCH))
    assert (found.level == found.first).all()
    assert same(found, attempts(clock(experiment, 1, load=busier)))


def test_nobody_switches_while_the_load_stays(experiment: Experiment) -> None:
    for own in (LoadConfig(SHARES, stay=0.5), LoadConfig(SHARES, stay=1.0, mid_round=True)):
        assert same(
            attempts(clock(experiment, load=own, policy=SWITCH)), attempts(clock(experiment, load=own))
        )


# Stragglers and clients that are lost.


@pytest.mark.parametrize("name", sorted(stragglers.DISTRIBUTIONS))
def test_a_straggler_computes_longer_and_sends_as_always(experiment: Experiment, name: str) -> None:
    own = StragglersConfig(name, slow_share=0.5)
    made, number = clock(experiment, stragglers=own), 4
    factors = stragglers.slowdown(own, made.config.seed, number, EVERYONE)
    assert (factors != 1).any() or name == "none"
    expected = []
    for client in range(CLIENTS):
        down, compute, up = parts(made, client, int(made.plan.level_of[client]))
        expected.append((down, compute * factors[client], up))
    assert durations(attempts(made, number=number)) == close(expected)


def test_a_lost_client_is_lost_at_some_moment_of_its_round(experiment: Experiment) -> None:
    made, number, start = clock(experiment, dropout=0.5), 3, 1000.0
    found = attempts(made, number=number, start=start)
    who, when = (draws.uniforms(made.config.seed, Purpose.LOSS, number, EVERYONE, draw=d) for d in (0, 1))
    expected = np.where(who < 0.5, start + when * (found.finish - start), np.inf)
    assert found.lost.tolist() == expected.tolist()
    assert 0 < np.count_nonzero(np.isinf(expected)) < CLIENTS
    assert durations(found) == durations(attempts(clock(experiment), number=number, start=start))


@pytest.mark.parametrize(("chance", "lost"), [(0.0, 0), (1.0, CLIENTS)])
def test_nobody_or_everybody_is_lost(experiment: Experiment, chance: float, lost: int) -> None:
    for number in range(5):
        found = attempts(clock(experiment, dropout=chance), number=number)
        assert np.count_nonzero(found.lost < found.finish) == lost
        assert (found.lost > found.start).all()


def test_who_is_lost_at_a_small_chance_is_lost_at_a_larger_one(experiment: Experiment) -> None:
    found = [np.isfinite(attempts(clock(experiment, dropout=p)).lost) for p in (0.2, 0.5, 0.8)]
    assert all((small <= large).all() for small, large in itertools.pairwise(found))
    assert found[0].sum() < found[2].sum()


# Doing less to be in time.


def brute(
    made: Clock, ways: Callable[[int], Iterable[tuple[int, int]]], number: int, deadline: float
) -> list[tuple[int, int]]:
    """For each client the first (level, epochs) of its ways that is done in time alone, or else the last."""

    def in_time(client: int, level: int, epochs: int) -> bool:
        one = dataclasses.replace(_training(made, epochs), allocation=lambda _: np.array([level]))
        return bool(attempts(one, [client], number).finish[0] <= deadline)

    chosen = []
    for client in range(CLIENTS):
        own = list(ways(client))
        chosen.append(next((way for way in own if in_time(client, *way)), own[-1]))
    return chosen


def _training(made: Clock, epochs: int) -> Clock:
    config = made.config
    return dataclasses.replace(
        made, config=dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=epochs))
    )


DISTURBED: dict[str, Any] = {
    "load": LoadConfig(SHARES, stay=0.3),
    "stragglers": StragglersConfig("lognormal", sigma=1.0),
}


@pytest.mark.parametrize("number", [0, 1])
def test_partial_trains_the_most_epochs_that_fit(experiment: Experiment, number: int) -> None:
    """Against each number of epochs as a run of its own."""
    epochs, seen = 5, set()
    made = clock(experiment, epochs, policy=PolicyConfig(late="partial"), **DISTURBED)
    finishes = np.sort(attempts(made, number=number).finish)
    for deadline in (0.01, *(finishes * 0.6), finishes[3], finishes[-1]):
        found = attempts(made, number=number, deadline=float(deadline))
        levels = made.plan.level_of
        expected = brute(
            made,
            lambda c, levels=levels: [(int(levels[c]), e) for e in range(epochs, 0, -1)],
            number,
            deadline,
        )
        assert found.epochs.tolist() == [most for _, most in expected]
        assert found.level.tolist() == levels.tolist()
        for client, most in enumerate(found.epochs):
            alone = attempts(_training(made, int(most)), [client], number)
            assert durations(found)[client] == pytest.approx(durations(alone)[0], rel=1e-9)
        seen |= set(found.epochs.tolist())
    assert seen == set(range(1, epochs + 1))


@pytest.mark.parametrize("number", [0, 1])
def test_smaller_trains_the_largest_level_that_fits(experiment: Experiment, number: int) -> None:
    """None that is larger than the client's own."""
    made, seen = clock(experiment, policy=PolicyConfig(late="smaller"), **DISTURBED), set()
    finishes = np.sort(attempts(made, number=number).finish)
    for deadline in (0.01, *(finishes * 0.6), *(finishes * 0.9), finishes[-1]):
        found = attempts(made, number=number, deadline=float(deadline))
        levels = made.plan.level_of
        expected = brute(
            made, lambda c, levels=levels: [(v, EPOCHS) for v in range(levels[c], 0, -1)], number, deadline
        )
        assert found.level.tolist() == found.first.tolist() == [level for level, _ in expected]
        assert found.epochs.tolist() == [EPOCHS] * CLIENTS
        assert found.up.tolist() == [made.plan.level(int(v)).cost.bytes // 2 for v in found.level]
        seen |= {(int(levels[c]), level) for c, (level, _) in enumerate(expected)}
    assert seen == {(own, level) for own in range(1, LEVELS + 1) for level in range(1, own + 1)}


def test_who_drops_out_of_a_deadline_would_have_done_everything(experiment: Experiment) -> None:
    made = clock(experiment, policy=PolicyConfig(late="drop"), **DISTURBED)
    assert same(attempts(made, deadline=0.01), attempts(made))


@pytest.mark.parametrize("late", ["drop", "partial", "smaller"])
def test_without_a_deadline_or_with_one_for_all_nobody_does_less(experiment: Experiment, late: str) -> None:
    made = clock(experiment, policy=PolicyConfig(late=late), **DISTURBED)
    plain = attempts(clock(experiment, **DISTURBED))
    for deadline in (np.inf, float(plain.finish.max())):
        assert same(attempts(made, deadline=deadline), plain)


def test_the_deadline_counts_from_the_start(experiment: Experiment) -> None:
    made = clock(experiment, policy=PolicyConfig(late="partial"))
    early, late = (attempts(made, start=start, deadline=20.0) for start in (0.0, 4096.0))
    assert early.epochs.tolist() == late.epochs.tolist()
    assert set(early.epochs.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("epochs", [3, 4])
def test_partial_work_switches_in_the_middle_of_what_is_left(experiment: Experiment, epochs: int) -> None:
    """As many epochs of the larger level as are trained before it, and no switch within a single one."""
    own, seen = LoadConfig(SHARES, stay=0.0, mid_round=True), set()
    policy = PolicyConfig(late="partial", switch=True)
    made = clock(experiment, epochs, load=own, policy=policy)
    for number, share in itertools.product(range(4), (0.5, 0.7, 0.9)):
        deadline = float(attempts(made, number=number).finish.max()) * share
        found = attempts(made, number=number, deadline=deadline)
        for client, most in enumerate(found.epochs):
            alone = attempts(_training(made, int(most)), [client], number)
            assert (found.level[client], found.first[client]) == (alone.level[0], alone.first[0])
            assert durations(found)[client] == pytest.approx(durations(alone)[0], rel=1e-9)
            seen.add((int(most), bool(found.level[client] < found.first[client])))
    assert (1, True) not in seen
    assert {(1, False), (2, True)} <= seen


# Devices that come and go.


def following(experiment: Experiment, there: Availability) -> Experiment:
    return dataclasses.replace(
        experiment, population=dataclasses.replace(experiment.population, availability=there)
    )


def trace(*intervals: tuple[float, float], period: float) -> Availability:
    """All clients follow one user."""
    starts, ends = (np.array(column, dtype=float) for column in zip(*intervals, strict=True))
    table = tables.Availability(
        np.array([0, len(intervals)]), starts, ends, np.array([0.0]), np.array([period])
    )
    return Traces(table, np.zeros(CLIENTS, dtype=np.int64))


def test_an_absent_client_pauses_and_goes_on(experiment: Experiment) -> None:
    """Client 0 takes the download in its first interval, and computes over two jumps."""
    down, compute, up = parts(clock(experiment), 0, int(experiment.plan.level_of[0]))
    first, second = np.ceil(down) + 1, np.ceil(compute / 2)
    there = trace((0.0, first), (100.0, 100 + second), (200.0, 1000.0), period=2000.0)
    found = attempts(clock(following(experiment, there)), [0])
    (row,) = zip(found.downloaded, found.computed, found.finish, strict=True)
    done = 200 + compute - (first - down) - second
    assert row == pytest.approx((down, done, done + up), rel=1e-9)
    assert np.isinf(found.lost[0])


def test_an_absent_client_is_lost(experiment: Experiment) -> None:
    """At the moment at which it goes; who is through before is not."""
    there = trace((0.0, 30.0), (500.0, 1000.0), period=2000.0)
    gone = AvailabilityConfig("csv", away="lose")
    found = attempts(clock(following(experiment, there), availability=gone))
    assert found.lost.tolist() == [30.0] * CLIENTS
    assert same(
        dataclasses.replace(found, lost=np.full(CLIENTS, np.inf)),
        attempts(clock(experiment)),
    )
    assert 0 < np.count_nonzero(found.finish < found.lost) < CLIENTS
    later = attempts(clock(following(experiment, there), availability=gone), start=600.0)
    assert later.lost.tolist() == [1000.0] * CLIENTS


def test_who_pauses_may_be_lost_while_it_pauses(experiment: Experiment) -> None:
    there = trace((0.0, 2.0), (1e6, 2e6), period=4e6)
    found = attempts(clock(following(experiment, there), dropout=1.0), number=1)
    (when,) = (draws.uniforms(0, Purpose.LOSS, 1, EVERYONE, draw=1),)
    assert found.lost == pytest.approx(when * found.finish, rel=1e-12)
    assert ((found.lost > 2) & (found.lost < 1e6)).any()


def test_an_absent_client_is_lost_by_whatever_comes_first(experiment: Experiment) -> None:
    there = trace((0.0, 30.0), (500.0, 1000.0), period=2000.0)
    gone = AvailabilityConfig("csv", away="lose")
    alone = attempts(clock(experiment, dropout=1.0))
    found = attempts(clock(following(experiment, there), availability=gone, dropout=1.0))
    assert found.lost.tolist() == np.minimum(alone.lost, 30.0).tolist()
    assert 0 < np.count_nonzero(found.lost == 30.0) < CLIENTS


# What a draw depends on.


EVERYTHING: dict[str, Any] = {
    "load": LoadConfig(SHARES, stay=0.3, mid_round=True),
    "stragglers": StragglersConfig("shifted_exponential"),
    "dropout": 0.3,
}


@settings(max_examples=40, deadline=None)
@given(
    clients=st.sets(st.integers(0, CLIENTS - 1), max_size=CLIENTS),
    number=st.integers(0, 20),
    late=st.sampled_from(["drop", "partial", "smaller"]),
    deadline=st.sampled_from([5.0, 20.0, np.inf]),
    switch=st.booleans(),
)
def test_what_a_client_does_depends_on_nobody_else(
    experiment: Experiment, clients: set[int], number: int, late: str, deadline: float, switch: bool
) -> None:
    """Its level (drawn here), other work, slowness, loss, and what it does less."""
    policy = PolicyConfig(late=late, switch=switch)
    made = dataclasses.replace(clock(experiment, policy=policy, **EVERYTHING), allocation=window)
    some = sorted(clients)
    together = attempts(made, number=number, start=10.0, deadline=deadline)
    assert same(attempts(made, some, number, 10.0, deadline), together.at(np.array(some, dtype=np.int64)))


def test_rounds_and_seeds_differ(experiment: Experiment) -> None:
    made = clock(experiment, **EVERYTHING)
    other = dataclasses.replace(made, config=dataclasses.replace(made.config, seed=1))
    first, second, third = attempts(made), attempts(made, number=1), attempts(other)
    assert len({found.finish.tobytes() for found in (first, second, third)}) == 3
    assert len({found.lost.tobytes() for found in (first, second, third)}) == 3


# Who is asked.


def test_clients_are_those_that_the_availability_draws(experiment: Experiment) -> None:
    there = trace((0.0, 30.0), (500.0, 1000.0), period=2000.0)
    for made in (clock(experiment), clock(following(experiment, there))):
        dispatch, own = made.dispatch(view(made, 2)), made.population.availability
        for time, busy in ((10.0, NOBODY), (40.0, np.array([1, 5]))):
            expected = own.draw(made.config.seed, 2, 3, 4, time, busy)
            assert dispatch.draw(2, 3, 4, time, busy).tolist() == expected.tolist()
            assert dispatch.next_available(time, busy) == own.next_available(time, busy)


class Some(Always):
    """The odd clients alone are there, from second 50 on."""

    def available(self, time: float, clients: np.ndarray) -> np.ndarray:
        there: np.ndarray = (clients % 2 == 1) & (time >= 50)
        return there

    def next_start(self, time: float, clients: np.ndarray) -> np.ndarray:
        return np.where(clients % 2 == 1, max(time, 50.0), np.inf)


def test_of_a_tier_those_are_asked_who_are_there_and_free(experiment: Experiment) -> None:
    made = clock(following(experiment, Some(CLIENTS)))
    dispatch, tier = made.dispatch(view(made)), np.array([1, 2, 3, 4, 7])
    assert dispatch.draw(0, 0, 5, 60.0, NOBODY, tier).tolist() == [1, 3, 7]
    assert dispatch.draw(0, 0, 5, 60.0, np.array([0, 3]), tier).tolist() == [1, 7]
    assert dispatch.draw(0, 0, 5, 40.0, NOBODY, tier).tolist() == []
    seen = {tuple(dispatch.draw(number, 0, 2, 60.0, NOBODY, tier).tolist()) for number in range(50)}
    assert seen == {(1, 3), (1, 7), (3, 7)}
    assert dispatch.next_available(40.0, NOBODY, tier) == 50.0
    assert dispatch.next_available(60.0, np.array([1]), tier) == 60.0
    assert dispatch.next_available(60.0, np.array([1, 3, 7]), tier) == np.inf
    assert dispatch.next_available(40.0, NOBODY, np.array([0, 2])) == np.inf


def test_tiers_are_of_equally_fast_clients(experiment: Experiment) -> None:
    """All of them are drawn, by their shares; together they are everybody, and a faster one has the faster clients."""
    made, shares, rounds = clock(experiment), [0.5, 0.3, 0.2], 2000
    dispatch = made.dispatch(view(made))
    seconds = np.array([sum(parts(made, c, int(made.plan.level_of[c]))) for c in range(CLIENTS)])
    by_speed = np.argsort(seconds)
    expected = [sorted(by_speed[rows].tolist()) for rows in (slice(0, 3), slice(3, 6), slice(6, 8))]
    drawn = [dispatch.tier(number, shares).tolist() for number in range(rounds)]
    frequencies = np.array([drawn.count(tier) for tier in expected]) / rounds
    assert frequencies.sum() == 1
    error = 6 * np.sqrt(np.array(shares) * (1 - np.array(shares)) / rounds)
    assert (np.abs(frequencies - shares) < error).all()


def test_a_tier_without_a_share_is_never_asked(experiment: Experiment) -> None:
    made = clock(experiment)
    dispatch = made.dispatch(view(made))
    only = sorted(made.fastest_first[2:4].tolist())
    assert all(dispatch.tier(number, [0.0, 1.0, 0.0, 0.0]).tolist() == only for number in range(50))


# Submodels of sizes that the plan does not know.


class Halved(Planned):
    """Every third client has half of its level's channels left."""

    resizes = True

    def submodels(self, round: Round, levels: np.ndarray) -> list[Submodel]:
        made = super().submodels(round, levels)
        return [
            halved(own) if client % 3 == 0 else own
            for client, own in zip(round.participants, made, strict=True)
        ]


def halved(submodel: Submodel) -> Submodel:
    channels = tuple(max(1, int(kept) // 2) for kept in submodel.channels)  # type: ignore[arg-type]
    return dataclasses.replace(submodel, channels=channels)


def test_a_client_is_charged_what_is_left_of_its_submodel(experiment: Experiment) -> None:
    made = dataclasses.replace(clock(experiment), rule=Halved())
    found, plain = attempts(made), attempts(clock(experiment))
    for client in range(CLIENTS):
        one = np.array([client])
        if client % 3:
            assert same(found.at(one), plain.at(one))
            continue
        own = halved(made.plan.level(int(made.plan.level_of[client])).submodel)
        counted = count(extract(made.plan.model.build(), made.plan.anatomy, own), made.plan.model.input_shape)
        assert (found.down[client], found.up[client]) == (2 * counted.bytes, counted.bytes // 2)
        operations = 9 * counted.macs * int(made.population.samples[client]) * EPOCHS
        assert durations(found)[client] == pytest.approx(
            (
                LATENCY / 2 + 16 * counted.bytes / (DOWN * (client + 1)),
                operations / (FLOPS * (client + 1)),
                LATENCY / 2 + 8 * (counted.bytes // 2) / (UP * (client + 1)),
            ),
            rel=1e-9,
        )


def test_hermes_charges_what_a_client_has_left(tmp_path: Path) -> None:
    """Of its own model, which only the client's personal state tells."""
    made = prepare(small(tmp_path, "hermes", "model.name=resnet8"))
    whole = made.plan.level(1).submodel
    left = {1: halved(whole), 4: halved(halved(whole))}

    def personal(client: int) -> State:
        return pack(1, left[client], {}) if client in left else {}

    round = dataclasses.replace(round_of(made), personal=personal)
    found = made.clock.dispatch(round).attempts(0, np.arange(6), 0.0, np.inf)
    counts = {
        client: count(extract(made.plan.model.build(), made.plan.anatomy, own), made.plan.model.input_shape)
        for client, own in left.items()
    }
    expected = [counts[c].bytes if c in counts else made.plan.level(1).cost.bytes for c in range(6)]
    assert found.down.tolist() == found.up.tolist() == expected
    assert expected[4] < expected[1] < expected[0]
    assert found.computed[1] - found.downloaded[1] < found.computed[0] - found.downloaded[0]


# Whether anybody can be in time.


@pytest.mark.parametrize("late", ["drop", "partial", "smaller"])
@pytest.mark.parametrize("draw", ["fixed", "window"])
def test_nobody_is_faster_than_the_fastest(experiment: Experiment, late: str, draw: str) -> None:
    """Whatever is drawn; and without disturbances the fastest client of all is as fast, or would be at level 1."""
    policy = PolicyConfig(name="deadline", late=late, deadline_s=1e-9)
    for time in ({}, EVERYTHING, {"stragglers": StragglersConfig("lognormal", sigma=2.0)}):
        made = clock(experiment, policy=policy, **time)
        made = made if draw == "fixed" else dataclasses.replace(made, allocation=window)
        for number in range(10):
            found = attempts(made, number=number, deadline=1e-9)
            assert found.finish.min() >= made.fastest() * (1 - 1e-12)
    plain = clock(experiment, policy=policy)
    assert plain.fastest() == pytest.approx(attempts(plain, deadline=1e-9).finish.min(), rel=1e-12)


def test_the_fastest_has_the_level_that_its_memory_allows(experiment: Experiment) -> None:
    ones = np.ones(CLIENTS, dtype=np.int64)
    population = dataclasses.replace(experiment.population, largest=ones)
    plan = dataclasses.replace(experiment.plan, level_of=ones * 3)
    made = clock(dataclasses.replace(experiment, population=population, plan=plan))
    assert made.fastest() == pytest.approx(sum(parts(made, CLIENTS - 1, 1)), rel=1e-12)
