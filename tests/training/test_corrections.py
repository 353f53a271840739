"""Corrections of client drift against loops written out by hand, and where their variates live.

A perceptron without norms, so that every gradient is a plain one; clients train through real cohorts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster_fl.aggregation.nested import PartialSum
from cluster_fl.aggregation.server import CONTROL, DYNAMIC
from cluster_fl.config import Config, CorrectionConfig, ModelConfig, PairConfig
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.nesting.extraction import extract, load
from cluster_fl.nesting.plan import State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.records import RunFolder
from cluster_fl.seeding import Purpose, torch_generator
from cluster_fl.training.cohort import Cohort, CohortResult, Member
from cluster_fl.training.corrections import Correction, correction
from cluster_fl.training.program import SGD, Effort
from tests.tiny import run_here, scattered, tiny, worker_of

CLIENT, WEIGHT = 3, 0.25
RATE, ALPHA, MU = 0.125, 0.5, 0.25
SMALL, FULL = 1, 2
# Gradients are sums in float32, which the loop by hand may round otherwise.
CLOSE = 2e-6
Offset = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def perceptron(folder: Path, *overrides: str) -> Config:
    config = tiny(folder, *overrides)
    config.model = ModelConfig("mlp", exit_head="linear")
    config.levels.pairs = [PairConfig(0.5, 1), PairConfig(1.0, 2)]
    return config


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return prepare(perceptron(tmp_path_factory.mktemp("tiny"), "train.momentum=0", f"train.lr={RATE}"))


@pytest.fixture(scope="module")
def state(plain: Experiment) -> State:
    return plain.initial_state()


def corrected(experiment: Experiment, name: str, mu: float = MU, **train: Any) -> Experiment:
    """The same experiment with a correction."""
    own = dataclasses.replace(
        experiment.config.train, correction=CorrectionConfig(name, mu=mu, alpha=ALPHA), **train
    )
    return dataclasses.replace(experiment, config=dataclasses.replace(experiment.config, train=own))


def trained(
    experiment: Experiment,
    published: State,
    level: int,
    personal: State | None = None,
    submodel: Submodel | None = None,
    round: int = 0,
) -> CohortResult:
    """One client's round."""
    submodel = submodel or experiment.plan.level(level).submodel
    member = Member(CLIENT, WEIGHT, submodel, personal or {})
    return Cohort(round, 0, level, (member,), WEIGHT, work=1.0).run(worker_of(experiment), published)


def deltas(result: CohortResult) -> dict[str, np.ndarray]:
    """The client's update, by the state's key, in the submodel's coordinates."""
    assert result.report.refused == ()
    return {key: update / WEIGHT for key, update in result.partial.updates.items()}


def bits(partial: PartialSum) -> dict[str, bytes]:
    return {key: update.tobytes() for key, update in partial.updates.items()}


def by_hand(
    experiment: Experiment,
    start: State,
    level: int,
    offset: Offset,
    submodel: Submodel | None = None,
    round: int = 0,
) -> tuple[dict[str, np.ndarray], int]:
    """w = w - lr (gradient + offset); returns trained minus received by name, and the number of steps."""
    plan, worker = experiment.plan, worker_of(experiment)
    submodel = submodel or plan.level(level).submodel
    received = plan.holding(level, submodel).gather(start)
    model = extract(plan.model.build(), plan.anatomy, submodel).train()
    load(model, received)
    program = experiment.program
    assert isinstance(program, SGD)
    generator = torch_generator(experiment.config.seed, Purpose.TRAIN, round, CLIENT)
    images, labels = worker.data.epoch(experiment.population.shares.train[CLIENT], generator)
    size, steps = experiment.config.train.batch_size, 0
    for x, y in zip(images.split(size), labels.split(size), strict=True):
        loss = program.objective(model(x), y, round / experiment.config.rounds)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, w), gradient in zip(model.named_parameters(), gradients, strict=True):
                w.sub_(RATE * (gradient + offset(name, w, torch.tensor(received[name]))))
        steps += 1
    return {name: w.detach().numpy() - received[name] for name, w in model.named_parameters()}, steps


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=CLOSE, err_msg=name)


def differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """By far more than rounding, in every tensor."""
    return all(np.abs(one[name] - other[name]).max() > 100 * CLOSE for name in one)


def nothing(name: str, w: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return torch.zeros(())


def test_without_a_correction(plain: Experiment, state: State) -> None:
    """Otherwise the loop by hand would prove nothing."""
    expected, steps = by_hand(plain, state, FULL, nothing)
    result = trained(plain, state, FULL)
    close(deltas(result), expected)
    assert result.report.steps == (steps,)
    assert steps > 10
    assert (result.extra, result.personal) == (None, {})


# FedProx.


@pytest.mark.parametrize("level", [SMALL, FULL])
def test_proximal_pulls_towards_the_received_weights(plain: Experiment, state: State, level: int) -> None:
    expected, _ = by_hand(plain, state, level, lambda _, w, start: MU * (w - start))
    found = deltas(trained(corrected(plain, "proximal"), state, level))
    close(found, expected)
    assert differ(found, deltas(trained(plain, state, level)))


def test_proximal_without_weight_is_no_correction(plain: Experiment, state: State) -> None:
    free = trained(corrected(plain, "proximal", mu=0.0), state, FULL)
    assert bits(free.partial) == bits(trained(plain, state, FULL).partial)


# SCAFFOLD.


def published(state: State, control: State | None = None) -> State:
    """The state with the server's variate; zero if none is given."""
    zeros = {key: np.zeros_like(array) for key, array in state.items()}
    return state | {CONTROL + key: array for key, array in (zeros | (control or {})).items()}


def random_like(state: State, seed: int) -> State:
    rng = np.random.default_rng(seed)
    return {key: (0.1 * rng.normal(size=a.shape)).astype(np.float32) for key, a in state.items()}


@pytest.mark.parametrize("level", [SMALL, FULL])
def test_scaffolds_first_round_is_uncorrected(plain: Experiment, state: State, level: int) -> None:
    """c_k becomes (received - trained) / (K eta), and that is what the server is told."""
    found, free = trained(corrected(plain, "scaffold"), published(state), level), trained(plain, state, level)
    assert bits(found.partial) == bits(free.partial)
    distance = free.report.steps[0] * RATE
    assert found.extra is not None
    for name, key in plain.plan.holding(level).keys.items():
        expected = -deltas(free)[key] / distance
        own = found.personal[CLIENT][key][plain.plan.holding(level).where[name]]
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.extra.updates[key] / WEIGHT, expected, rtol=0, atol=1e-6)


def test_scaffolds_second_round_uses_both_variates(plain: Experiment, state: State) -> None:
    """The gradient has c - c_k added; c_k changes by (received - trained) / (K eta) - c."""
    control, own = random_like(state, 1), random_like(state, 2)

    def offset(name: str, w: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return torch.tensor(control[name] - own[name])

    made = corrected(plain, "scaffold")
    found = trained(made, published(state, control), FULL, own, round=1)
    expected, steps = by_hand(made, state, FULL, offset, round=1)
    close(deltas(found), expected)
    assert differ(deltas(found), deltas(trained(plain, state, FULL, round=1)))
    assert found.extra is not None
    change = {name: -moved / (steps * RATE) - control[name] for name, moved in expected.items()}
    close({key: update / WEIGHT for key, update in found.extra.updates.items()}, change)
    close(found.personal[CLIENT], {name: own[name] + change[name] for name in change})


@pytest.mark.parametrize("idle", [{"epochs": 0}, {"lr": 0.0}])
def test_a_client_that_did_not_move_says_nothing(
    plain: Experiment, state: State, idle: dict[str, Any]
) -> None:
    made = corrected(plain, "scaffold", **idle)
    found = trained(made, published(state, random_like(state, 1)), FULL, random_like(state, 2))
    assert (found.extra, found.personal) == (None, {})


def test_the_servers_variate_is_the_mean_of_the_clients(tmp_path: Path) -> None:
    """With everybody in every round: c and all c_k begin at zero and c grows by the mean of their changes."""
    config = perceptron(tmp_path, "method=scaffold", "clients.per_round=8", "rounds=2")
    run_here(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    progress = folder.load(config)
    assert progress is not None
    assert progress.clients == dict.fromkeys(range(8), 1)
    own = [folder.clients.load(client, 1) for client in range(8)]
    for key in progress.state:
        control = progress.memory[CONTROL + key]
        np.testing.assert_allclose(control, np.mean([kept[key] for kept in own], axis=0), rtol=0, atol=1e-6)
        assert np.abs(control).max() > 1e-4


# FedDyn.


@pytest.mark.parametrize("level", [SMALL, FULL])
def test_two_rounds_of_feddyn(plain: Experiment, state: State, level: int) -> None:
    """The gradient has alpha (w - received) - h_k added; afterwards h_k falls by alpha (trained - received)."""
    made, holding = corrected(plain, "feddyn"), plain.plan.holding(level)
    h = {name: np.zeros_like(array) for name, array in holding.gather(state).items()}
    personal: State = {}
    for round in range(2):

        def offset(name: str, w: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            return ALPHA * (w - start) - torch.tensor(h[name])  # noqa: B023 - called in this round alone

        expected, _ = by_hand(made, state, level, offset, round=round)
        found = trained(made, state, level, personal, round=round)
        close(deltas(found), expected)
        assert differ(deltas(found), deltas(trained(plain, state, level, round=round)))
        assert found.extra is None
        h = {name: h[name] - np.float32(ALPHA) * moved for name, moved in expected.items()}
        personal = found.personal[CLIENT]
        close({name: personal[key][holding.where[name]] for name, key in holding.keys.items()}, h)


def test_the_servers_h_is_the_mean_of_the_clients(tmp_path: Path) -> None:
    """Whoever takes part, with whatever submodel: both fall by alpha times the same updates."""
    config = perceptron(tmp_path, "train.correction={name: feddyn, alpha: 0.5}", "train.momentum=0")
    run_here(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    progress = folder.load(config)
    assert progress is not None
    own = [folder.clients.load(client, at) for client, at in progress.clients.items()]
    assert any(kept.keys() != progress.state.keys() for kept in own)  # some hold a small submodel
    for key in progress.state:
        mean = sum(kept[key].astype(np.float64) for kept in own if key in kept) / 8
        np.testing.assert_allclose(progress.memory[DYNAMIC + key], mean, rtol=0, atol=1e-6)
        assert np.abs(mean).max() > 1e-4


# Where variates live.


def other_channels(experiment: Experiment) -> Submodel:
    """As many as the small level has, but others."""
    return scattered(experiment.plan.anatomy, experiment.plan.level(SMALL).submodel, seed=1)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_variates_have_full_coordinates(plain: Experiment, state: State, name: str) -> None:
    """What a client does not hold stays as it is: zero, or what it was when the client last held it."""
    made, start = corrected(plain, name), published(state)
    first = trained(made, start, SMALL).personal[CLIENT]
    front = plain.plan.holding(SMALL)
    assert first.keys() == set(front.keys.values())
    for of, key in front.keys.items():
        assert first[key].shape == state[key].shape
        outside = np.ones(state[key].shape, dtype=bool)
        outside[front.where[of]] = False
        assert not first[key][outside].any()
        assert first[key][front.where[of]].any()

    kept = {key: array.copy() for key, array in first.items()}
    second = trained(made, start, SMALL, first, other_channels(plain), round=1).personal[CLIENT]
    back = plain.plan.holding(SMALL, other_channels(plain))
    for of, key in back.keys.items():
        outside = np.ones(state[key].shape, dtype=bool)
        outside[back.where[of]] = False
        assert second[key][outside].tobytes() == kept[key][outside].tobytes()
        assert (second[key] != kept[key])[back.where[of]].any()
    assert all(first[key].tobytes() == kept[key].tobytes() for key in kept)  # what it was handed stays


@pytest.mark.parametrize("submodel", [None, other_channels])
def test_a_variate_outlives_its_submodel(
    plain: Experiment, state: State, submodel: Callable[[Experiment], Submodel] | None
) -> None:
    """A client of the full model, with a variate, trains a small one: it uses the held part."""
    control, own = random_like(state, 3), random_like(state, 4)
    made, chosen = corrected(plain, "scaffold"), submodel(plain) if submodel else None
    holding = plain.plan.holding(SMALL, chosen)

    def offset(name: str, w: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        key, where = holding.keys[name], holding.where[name]
        return torch.tensor(control[key][where] - own[key][where])

    found = trained(made, published(state, control), SMALL, own, chosen)
    expected, _ = by_hand(made, state, SMALL, offset, chosen)
    close(deltas(found), {holding.keys[name]: moved for name, moved in expected.items()})


@pytest.mark.parametrize(
    ("name", "keeps", "effort"),
    [
        ("none", False, Effort()),
        ("proximal", False, Effort()),
        ("scaffold", True, Effort(compute=1.0, down=2.0, up=2.0)),
        ("feddyn", True, Effort()),
    ],
)
def test_what_a_correction_costs(plain: Experiment, name: str, keeps: bool, effort: Effort) -> None:
    program = corrected(plain, name).program
    assert (program.keeps_state, program.effort(plain.plan.level(FULL))) == (keeps, effort)
    made: Correction = correction(CorrectionConfig(name))
    assert made.keeps_state is keeps
