"""What a round takes a device: against hand-calculated times of a phone that trains ScaleFL's ResNet110."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.experiment import Experiment, prepare
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.cost import count
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.plan import Level
from cluster_fl.timing.devices import Devices
from cluster_fl.timing.roofline import Roofline
from cluster_fl.timing.work import Charge, Work, roofline_batch
from cluster_fl.training.program import Context, Effort, LocalProgram, Trained
from tests.tiny import LEVELS, scattered, tiny

MACS, SAMPLES = 253_000_000, 500 * 5  # ResNet110 on 32 x 32; a client's 500 samples, five epochs


def devices(**columns: list[float] | float) -> Devices:
    """Devices on which everything is instant but what ``columns`` say."""
    names = [field.name for field in dataclasses.fields(Devices)]
    count = max(np.size(column) for column in columns.values())
    usual = dict.fromkeys(names, np.inf) | {"latency": 0.0}
    return Devices(**{name: np.full(count, columns.get(name, usual[name]), dtype=float) for name in names})


def charge(macs: float = 0, payload: int = 0, up: int | None = None) -> Charge:
    """``payload`` goes both ways, unless ``up`` says otherwise."""
    return Charge(3.0, 2.0 * macs, payload, payload if up is None else up)


def seconds(made: Devices, macs: float = 0, payload: int = 0, samples: int = 0) -> float:
    who = np.array([0])
    (result,) = Work.of([charge(macs, payload)], who, made, who, np.array([samples])).seconds
    return float(result)


@pytest.mark.parametrize(("gflops", "expected"), [(5.77, 658), (1.76, 2156), (0.63, 6024)])
def test_compute(gflops: float, expected: int) -> None:
    """3 passes x 2 operations x 253 MMAC x 2500 samples = 3.795e12 operations."""
    found = seconds(devices(flops=gflops * 1e9), macs=MACS, samples=SAMPLES)
    assert found == pytest.approx(3.795e12 / (gflops * 1e9), rel=1e-12)
    assert round(found) == expected


def test_transfer() -> None:
    """1.73 million float32 are 55.36 Mbit: 9.1 s up at 6.1 Mbit/s, 2.1 s down at 26.1 Mbit/s."""
    payload = 1_730_000 * 4
    assert seconds(devices(up=6.1e6), payload=payload) == pytest.approx(55.36 / 6.1, rel=1e-12)
    assert round(seconds(devices(up=6.1e6), payload=payload), 1) == 9.1
    assert round(seconds(devices(down=26.1e6), payload=payload), 1) == 2.1


def test_parts_add_up() -> None:
    alone = [
        seconds(devices(**{key: value}), MACS, 4_000_000, SAMPLES)
        for key, value in [("flops", 2e9), ("down", 2e7), ("up", 5e6), ("latency", 0.05)]
    ]
    together = seconds(devices(flops=2e9, down=2e7, up=5e6, latency=0.05), MACS, 4_000_000, SAMPLES)
    assert together == pytest.approx(sum(alone), rel=1e-12)
    assert alone == pytest.approx([1897.5, 1.6, 6.4, 0.05], rel=1e-12)


def test_half_of_the_round_trip_goes_with_each_way() -> None:
    who = np.array([0])
    found = Work.of([charge(MACS, 1000)], who, devices(latency=0.5), who, np.array([SAMPLES]))
    assert [part.tolist() for part in (found.download, found.compute, found.upload)] == [[0.25], [0], [0.25]]


def test_each_client_has_its_own_device_and_work() -> None:
    made = devices(flops=[1e9, 2e9, 4e9], down=[1e6, 2e6, 4e6], up=[1e6, 1e6, 8e6], latency=0.5)
    charges = [charge(10**9, 10**6, 2 * 10**6), charge(10**8, 10**5, 10**4)]
    clients, samples = np.array([2, 0]), np.array([4, 10])
    found = Work.of(charges, np.array([0, 1]), made, clients, samples)
    assert found.download == pytest.approx([0.25 + 8 / 4, 0.25 + 0.8 / 1], rel=1e-12)
    assert found.compute == pytest.approx([24 / 4, 6 / 1], rel=1e-12)
    assert found.upload == pytest.approx([0.25 + 16 / 8, 0.25 + 0.08 / 1], rel=1e-12)
    assert found.seconds == pytest.approx([10.5, 7.38], rel=1e-12)
    assert (found.down.tolist(), found.up.tolist()) == ([10**6, 10**5], [2 * 10**6, 10**4])
    assert found.down.dtype == found.up.dtype == np.int64


@given(st.lists(st.integers(0, 2), max_size=8))
def test_who_shares_a_charge_does_not_show(which: list[int]) -> None:
    """A client's work is that of a round of its own."""
    charges = [charge(macs, payload) for macs, payload in ((0, 7), (10**6, 0), (10**9, 4096))]
    count = len(which)
    made = devices(flops=list(range(1, 9)), down=[3.0] * 8, up=[7.0] * 8, latency=0.1)
    clients, samples = np.arange(count)[::-1], np.arange(count)
    found = Work.of(charges, np.array(which, dtype=np.int64), made, clients, samples)
    for at, number in enumerate(which):
        one = np.array([at])
        alone = Work.of([charges[number]], np.array([0]), made, clients[one], samples[one])
        assert {n: v[one].tolist() for n, v in vars(found).items()} == {
            n: v.tolist() for n, v in vars(alone).items()
        }


def test_nobody_has_nothing_to_do() -> None:
    nobody = np.zeros(0, dtype=np.int64)
    assert len(Work.of([], nobody, devices(flops=1.0), nobody, nobody).seconds) == 0


def test_a_client_without_samples_only_sends() -> None:
    assert seconds(devices(flops=1.0, down=8.0, up=4.0), MACS, 10, samples=0) == 10 + 20


# What a level costs.


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return prepare(tiny(tmp_path_factory.mktemp("tiny")))


class Costs(LocalProgram):
    """Nothing but an effort, which may differ between levels."""

    def __init__(self, *efforts: Effort) -> None:
        self._efforts = efforts

    def effort(self, level: Level) -> Effort:
        return self._efforts[level.number - 1]

    def train(self, model: Layered, context: Context) -> Trained:
        raise AssertionError("nothing is trained here")


PLAIN = Costs(*[Effort()] * LEVELS)


def test_a_level_costs_its_own_operations_and_bytes(experiment: Experiment) -> None:
    plan = experiment.plan
    found = [Charge.of(plan, PLAIN, level) for level in plan.levels]
    assert found == [
        Charge(3.0, 2.0 * level.cost.macs, level.cost.bytes, level.cost.bytes) for level in plan.levels
    ]
    assert len({one.flops for one in found}) == LEVELS


def test_effort_multiplies_compute_and_bytes(experiment: Experiment) -> None:
    factors = [Effort(2.0, 1.0, 3.0), Effort(1.5, 2.0, 1.0), Effort(0.25, 4.0, 0.5)]
    for level, effort in zip(experiment.plan.levels, factors, strict=True):
        found = Charge.of(experiment.plan, Costs(*factors), level)
        assert found.forwards == 3 * effort.compute
        assert found.flops == 2 * level.cost.macs
        assert (found.down, found.up) == (level.cost.bytes * effort.down, level.cost.bytes * effort.up)


def test_a_smaller_submodel_than_the_levels_costs_what_it_is(experiment: Experiment) -> None:
    plan, top = experiment.plan, experiment.plan.level(3)
    halves = tuple(max(1, int(kept) // 2) for kept in top.submodel.channels)  # type: ignore[arg-type]
    fewer = dataclasses.replace(top.submodel, channels=halves)
    counted = count(extract(plan.model.build(), plan.anatomy, fewer), plan.model.input_shape)
    for submodel in (fewer, scattered(plan.anatomy, fewer, seed=0)):
        found = Charge.of(plan, PLAIN, top, submodel)
        assert (found.flops, found.down, found.up) == (2 * counted.macs, counted.bytes, counted.bytes)
        assert found.down < top.cost.bytes


def test_other_channels_of_the_levels_shape_cost_what_the_level_does(experiment: Experiment) -> None:
    plan, top = experiment.plan, experiment.plan.level(2)
    other = scattered(plan.anatomy, top.submodel, seed=1)
    assert other != top.submodel
    assert Charge.of(plan, PLAIN, top, other) == Charge.of(plan, PLAIN, top)


def test_variates_travel_as_the_weights_do(tmp_path: Path) -> None:
    """SCAFFOLD's, both ways."""
    found = {}
    for name in ("none", "scaffold"):
        made = prepare(tiny(tmp_path, f"train.correction.name={name}", "train.momentum=0"))
        charged = [Charge.of(made.plan, made.program, level) for level in made.plan.levels]
        found[name] = [(one.forwards, one.flops, one.down, one.up) for one in charged]
    assert found["scaffold"] == [(f, g, 2 * down, 2 * up) for f, g, down, up in found["none"]]


# Where memory is slow.


def test_the_roofline_is_used_where_some_device_has_a_memory_bandwidth(experiment: Experiment) -> None:
    assert roofline_batch(experiment.config, devices(flops=[1.0, 2.0])) is None
    slow = devices(flops=[1.0, 2.0], memory_bandwidth=[np.inf, 1e9])
    assert roofline_batch(experiment.config, slow) == experiment.config.train.batch_size


def test_a_device_that_waits_for_memory(experiment: Experiment) -> None:
    """Each forward pass takes what the roofline says of it; where nothing waits, what the operations alone take."""
    plan, level, batch = experiment.plan, experiment.plan.level(3), 16
    made = devices(flops=2e9, memory_bandwidth=[np.inf, 1e6], latency=0.0)
    found = Charge.of(plan, PLAIN, level, batch=batch).compute(made, np.arange(2), np.array([7, 7]))
    waits = Roofline.of(plan.anatomy, level.submodel, batch).seconds(np.array([2e9]), np.array([1e6]))
    assert found[0] == pytest.approx(7 * 3 * 2 * level.cost.macs / 2e9, rel=1e-12)
    assert found[1] == pytest.approx(7 * 3 * waits[0], rel=1e-12)
    assert found[1] > found[0]
