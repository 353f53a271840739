"""Who trains which level: the draws against their exact distributions, and what they may depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.assignment import Planned, allocation, dynamic, fixed, planned, window
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.nesting.plan import Assignment, Plan
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.rounds import Round
from tests.tiny import LEVELS, assigned, round_of, scattered, select, tiny

CLIENTS = 100


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return prepare(tiny(tmp_path_factory.mktemp("tiny"), f"clients.count={CLIENTS}"))


def drawing(
    experiment: Experiment,
    level_of: np.ndarray,
    number: int = 0,
    seed: int = 0,
    levels: int = 5,
    **options: object,
) -> Round:
    """A round in which everybody takes part, under a plan of so many levels."""
    own = dataclasses.replace(experiment.config.levels, **options)  # type: ignore[arg-type]
    made = dataclasses.replace(
        experiment,
        config=dataclasses.replace(experiment.config, seed=seed, levels=own),
        plan=dataclasses.replace(
            experiment.plan, level_of=level_of, levels=tuple(experiment.plan.levels[0] for _ in range(levels))
        ),
    )
    return round_of(made, {}, number, range(len(level_of)))


def frequencies(draw: Callable[[Round], np.ndarray], rounds: list[Round], levels: int) -> np.ndarray:
    """How often each level was drawn, (levels,), of all draws."""
    drawn = np.concatenate([draw(round) for round in rounds])
    assert set(drawn.tolist()) <= set(range(1, levels + 1))
    return np.bincount(drawn, minlength=levels + 1)[1:] / len(drawn)


def within_six_sigma(found: np.ndarray, expected: np.ndarray, draws: int) -> None:
    bound = 6 * np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(found - expected) <= bound).all(), (found, expected, bound)


def window_marginals(tiers: int, reach: int) -> list[Fraction]:
    """Chance of each level for a client of a uniform tier, by counting."""
    chances = [Fraction(0)] * tiers
    for own in range(1, tiers + 1):
        near = [level for level in range(1, tiers + 1) if abs(level - own) <= reach]
        for level in near:
            chances[level - 1] += Fraction(1, tiers * len(near))
    return chances


def test_the_window_of_nefl(experiment: Experiment) -> None:
    """100 clients in five equal tiers, window 2."""
    expected = window_marginals(5, 2)
    assert sum(expected) == 1
    assert [round(float(chance), 5) for chance in expected] == [0.15667, 0.20667, 0.27333, 0.20667, 0.15667]
    tiers, rounds = np.repeat(np.arange(1, 6), CLIENTS // 5), 200
    drawings = [drawing(experiment, tiers, number, draw="window", window=2) for number in range(rounds)]
    found = frequencies(window, drawings, 5)
    within_six_sigma(found, np.array(expected, dtype=float), CLIENTS * rounds)


@pytest.mark.parametrize("own", range(1, 6))
@pytest.mark.parametrize("reach", [0, 1, 2, 4])
def test_a_window_is_uniform_about_the_clients_own_level(
    experiment: Experiment, own: int, reach: int
) -> None:
    rounds = [drawing(experiment, np.full(CLIENTS, own), number, window=reach) for number in range(20)]
    near = np.array([abs(level - own) <= reach for level in range(1, 6)])
    found = frequencies(window, rounds, 5)
    within_six_sigma(found, near / near.sum(), CLIENTS * len(rounds))


@pytest.mark.parametrize("shares", [None, [0.5, 0.25, 0.125, 0.125, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
def test_dynamic_draws_follow_the_shares(experiment: Experiment, shares: list[float] | None) -> None:
    """Whatever the clients' own levels are."""
    tiers = np.full(CLIENTS, 2)
    rounds = [drawing(experiment, tiers, number, shares=shares) for number in range(50)]
    found = frequencies(dynamic, rounds, 5)
    within_six_sigma(found, np.array(shares or [0.2] * 5), CLIENTS * len(rounds))


def test_a_single_level_needs_no_draw(experiment: Experiment) -> None:
    """FedAvg's, in a configuration of several."""
    one = drawing(experiment, np.ones(8, dtype=np.int64), levels=1, shares=[0.25, 0.25, 0.5])
    assert [draw(one).tolist() for draw in (fixed, dynamic, window)] == [[1] * 8] * 3


def test_fixed_levels_are_the_clients_own(experiment: Experiment) -> None:
    tiers = np.array([3, 1, 5, 2])
    round = drawing(experiment, tiers)
    assert fixed(round).tolist() == [3, 1, 5, 2]
    some = dataclasses.replace(round, participants=np.array([1, 2]))
    assert fixed(some).tolist() == [1, 5]


@settings(max_examples=25, deadline=None)
@given(
    participants=st.sets(st.integers(0, CLIENTS - 1), min_size=1, max_size=20),
    number=st.integers(0, 50),
    seed=st.integers(0, 50),
)
@pytest.mark.parametrize("draw", [dynamic, window])
def test_a_draw_depends_on_seed_round_and_client_alone(
    experiment: Experiment,
    draw: Callable[[Round], np.ndarray],
    participants: set[int],
    number: int,
    seed: int,
) -> None:
    """Not on who else takes part, nor on what was drawn before."""
    everybody = drawing(experiment, np.full(CLIENTS, 3), number, seed)
    chosen = np.array(sorted(participants))
    some = dataclasses.replace(everybody, participants=chosen)
    assert draw(some).tolist() == draw(everybody)[chosen].tolist()


@pytest.mark.parametrize("draw", [dynamic, window])
def test_seeds_and_rounds_draw_differently(
    experiment: Experiment, draw: Callable[[Round], np.ndarray]
) -> None:
    tiers = np.full(CLIENTS, 3)
    found = [draw(drawing(experiment, tiers, *of)).tolist() for of in ((0, 0), (1, 0), (0, 1))]
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize(("name", "draw"), [("fixed", fixed), ("dynamic", dynamic), ("window", window)])
def test_the_configuration_names_the_draw(
    experiment: Experiment, name: str, draw: Callable[[Round], np.ndarray]
) -> None:
    round = drawing(experiment, np.ones(1, dtype=np.int64), draw=name)
    assert allocation(round.config, round.plan) is draw


# From levels to submodels.


def test_assignments_are_in_client_order_with_the_plans_submodels(experiment: Experiment) -> None:
    plan, clients = experiment.plan, [4, 17, 80]
    round = round_of(experiment, {}, 0, clients)
    found = assigned(round, lambda _: np.array([3, 1, 2]), planned(experiment.config, plan))
    assert found == [
        Assignment(c, v, plan.level(v).submodel) for c, v in zip(clients, (3, 1, 2), strict=True)
    ]
    assert Planned().serve(round) == [plan.level(level).submodel for level in range(1, LEVELS + 1)]


class Joint(Planned):
    """A rule that decides for all participants together."""

    def submodels(self, round: Round, levels: np.ndarray) -> list[Submodel]:
        first = int(round.participants.min())
        return [scattered(round.plan.anatomy, round.plan.level(int(v)).submodel, first) for v in levels]


def test_a_rule_sees_all_participants_and_their_levels(experiment: Experiment) -> None:
    plan: Plan = experiment.plan
    found = assigned(round_of(experiment, {}, 0, [9, 5, 7]), lambda _: np.array([2, 2, 1]), Joint())
    assert [a.submodel for a in found] == [
        scattered(plan.anatomy, plan.level(v).submodel, 5) for v in (2, 2, 1)
    ]
    assert [a.submodel.shape for a in found] == [plan.level(v).submodel.shape for v in (2, 2, 1)]


# Levels by device.

SPEEDS = "time.devices.gflops=[8,1,5,2,7,3,6,4]"


def test_slow_devices_get_small_levels(tmp_path: Path) -> None:
    experiment = prepare(
        tiny(
            tmp_path,
            "levels.order=speed",
            "time.devices.source=values",
            SPEEDS,
            "levels.shares=[0.25,0.25,0.5]",
        )
    )
    assert experiment.plan.level_of.tolist() == [3, 1, 3, 1, 3, 2, 3, 2]


def test_the_order_of_speed_needs_speeds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^levels\.order=speed: needs devices"):
        tiny(tmp_path, "levels.order=speed")


def test_a_deadline_draws_what_is_done_in_time(tmp_path: Path) -> None:
    devices = (
        "time.devices.source=values",
        "time.devices.gflops=[0.01,0.02,0.05,0.1,0.2,0.01,0.02,0.5]",
        "clients.per_round=8",
    )
    experiment = prepare(tiny(tmp_path, "levels.draw=deadline", "levels.deadline_s=1.5", *devices))
    round = select(round_of(experiment))
    fixed_levels = dataclasses.replace(experiment.clock, allocation=fixed)
    for client, level in zip(round.participants, experiment.allocation(round), strict=True):
        seconds = []
        for number in range(1, LEVELS + 1):
            plan = dataclasses.replace(experiment.plan, level_of=np.full(8, number))
            alone = dataclasses.replace(round, plan=plan, participants=np.array([client]))
            done = dataclasses.replace(fixed_levels, plan=plan).dispatch(alone)
            seconds.append(float(done.attempts(0, alone.participants, 0.0, np.inf).finish[0]))
        assert level == max([n for n in range(1, LEVELS + 1) if seconds[n - 1] <= 1.5] or [1])
    assert set(experiment.allocation(round).tolist()) == {1, 2, 3}


def test_a_deadline_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^levels\.deadline_s"):
        tiny(tmp_path, "levels.draw=deadline")
