"""What a round costs: every participant's own submodel, samples and device, by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cluster_fl.experiment import Experiment, prepare
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.cost import count
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.plan import Assignment, Level
from cluster_fl.rounds import Round
from cluster_fl.timing.clock import Devices
from cluster_fl.timing.load import loads
from cluster_fl.timing.rounds import RoundCost, round_cost
from cluster_fl.timing.schema import LoadConfig
from cluster_fl.training.program import Context, Effort, LocalProgram, Trained
from tests.tiny import planned, round_of, scattered, tiny

CLIENTS, EPOCHS = 8, 3
LATENCY, FLOPS, DOWN, UP = 0.5, 2e9, 4e6, 1e6


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    made = prepare(tiny(tmp_path_factory.mktemp("tiny"), f"train.epochs={EPOCHS}"))
    speeds = np.arange(1, CLIENTS + 1)  # client c is c + 1 times as fast as client 0
    devices = Devices(FLOPS * speeds, DOWN * speeds, UP * speeds, LATENCY)
    return dataclasses.replace(made, population=dataclasses.replace(made.population, devices=devices))


class Costs(LocalProgram):
    """Nothing but an effort, which may differ between levels."""

    def __init__(self, *efforts: Effort) -> None:
        self._efforts = efforts

    def effort(self, level: Level) -> Effort:
        return self._efforts[level.number - 1]

    def train(self, model: Layered, context: Context) -> Trained:
        raise AssertionError("nothing is trained here")


PLAIN = Costs(Effort(), Effort(), Effort())


def seconds(client: int, macs: float, down: float, up: float, samples: int, busy: float = 0.0) -> float:
    """3 passes of 2 operations a multiply-accumulate, 8 bits a byte."""
    speed = client + 1
    compute = 6 * macs * samples * EPOCHS / (FLOPS * speed * (1 - busy))
    return LATENCY + 8 * down / (DOWN * speed) + compute + 8 * up / (UP * speed)


def costs(experiment: Experiment, program: LocalProgram = PLAIN, number: int = 0) -> tuple[Round, RoundCost]:
    round = round_of(experiment, number=number, clients=[0, 3, 4, 7])
    return round, round_cost(round, planned(round), program)


def test_a_round_by_hand(experiment: Experiment) -> None:
    round, found = costs(experiment)
    assert len({int(level) for level in round.plan.level_of[round.participants]}) > 1
    expected = []
    for position, client in enumerate(round.participants):
        own = round.plan.level(int(round.plan.level_of[client])).cost
        assert (found.down[position], found.up[position]) == (own.bytes, own.bytes)
        samples = len(experiment.population.shares.train[client])
        expected.append(seconds(int(client), own.macs, own.bytes, own.bytes, samples))
    assert found.seconds == pytest.approx(expected, rel=1e-12)
    assert found.length == max(found.seconds)


def test_effort_multiplies_compute_and_bytes(experiment: Experiment) -> None:
    factors = [Effort(2.0, 1.0, 3.0), Effort(1.5, 2.0, 1.0), Effort(0.25, 4.0, 0.5)]
    round, found = costs(experiment, Costs(*factors))
    for position, client in enumerate(round.participants):
        level = round.plan.level(int(round.plan.level_of[client]))
        effort, own = factors[level.number - 1], level.cost
        down, up = own.bytes * effort.down, own.bytes * effort.up
        assert (found.down[position], found.up[position]) == (down, up)
        samples = len(experiment.population.shares.train[client])
        expected = seconds(int(client), own.macs * effort.compute, down, up, samples)
        assert found.seconds[position] == pytest.approx(expected, rel=1e-12)


def test_a_busy_device_computes_at_what_is_left(experiment: Experiment) -> None:
    load = LoadConfig(shares=[0.0, 0.5, 0.75], stay=0.5)
    time = dataclasses.replace(experiment.config.time, load=load)
    busy = dataclasses.replace(experiment, config=dataclasses.replace(experiment.config, time=time))
    seen = set()
    for number in range(3):
        round, found = costs(busy, number=number)
        shares = loads(load, busy.config.seed, CLIENTS, number)
        for position, client in enumerate(round.participants):
            own = round.plan.level(int(round.plan.level_of[client])).cost
            samples = len(experiment.population.shares.train[client])
            expected = seconds(int(client), own.macs, own.bytes, own.bytes, samples, shares[client])
            assert found.seconds[position] == pytest.approx(expected, rel=1e-12)
            seen.add(float(shares[client]))
    assert seen == {0.0, 0.5, 0.75}


def test_a_smaller_submodel_than_the_levels_costs_what_it_is(experiment: Experiment) -> None:
    """Also where another client of the same round trains the level's own."""
    plan = experiment.plan
    top = plan.level(3).submodel
    fewer = dataclasses.replace(top, channels=tuple(max(1, int(c) // 2) for c in top.channels))  # type: ignore[arg-type]
    other = scattered(plan.anatomy, fewer, seed=0)
    assignments = [Assignment(0, 3, top), Assignment(1, 3, fewer), Assignment(2, 3, other)]
    found = round_cost(round_of(experiment, clients=range(3)), assignments, PLAIN)
    counted = count(extract(plan.model.build(), plan.anatomy, fewer), plan.model.input_shape)
    assert found.down.tolist() == [plan.level(3).cost.bytes, counted.bytes, counted.bytes]
    assert counted.bytes < plan.level(3).cost.bytes
    samples = len(experiment.population.shares.train[2])
    expected = seconds(2, counted.macs, counted.bytes, counted.bytes, samples)
    assert found.seconds[2] == pytest.approx(expected, rel=1e-12)


def test_another_level_than_the_clients_own(experiment: Experiment) -> None:
    """What is trained decides, not what could be afforded."""
    plan = experiment.plan
    client = int(np.flatnonzero(plan.level_of == 1)[0])
    assignment = Assignment(client, 3, plan.level(3).submodel)
    found = round_cost(round_of(experiment, clients=[client]), [assignment], PLAIN)
    assert found.up.tolist() == found.down.tolist() == [plan.level(3).cost.bytes]


def test_a_run_charges_what_the_correction_sends(tmp_path: Path) -> None:
    """SCAFFOLD's variates travel as the weights do."""
    bytes_of = {}
    for name in ("none", "scaffold"):
        made = prepare(tiny(tmp_path, f"train.correction.name={name}", "train.momentum=0"))
        round = round_of(made, clients=range(CLIENTS))
        found = round_cost(round, planned(round), made.program)
        bytes_of[name] = found.down.sum(), found.up.sum()
    assert bytes_of["scaffold"] == (2 * bytes_of["none"][0], 2 * bytes_of["none"][1])
