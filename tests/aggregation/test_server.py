"""Server steps against their papers' formulas, one number at a time."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from cluster_fl.aggregation.nested import Mean
from cluster_fl.aggregation.server import (
    CONTROL,
    DYNAMIC,
    FIRST,
    SECOND,
    Adaptive,
    Controlled,
    FedDyn,
    Move,
    OnParameters,
    ServerStep,
    server_step,
)
from cluster_fl.config import Config, ServerConfig
from cluster_fl.experiment import make_plan
from cluster_fl.nesting.extraction import read
from cluster_fl.nesting.plan import Plan, State
from cluster_fl.records import RunFolder
from tests.tiny import run_here, tiny

# Of "w", nobody speaks for the last element, and for the one before in the second round alone; of "b" nobody ever.
STATE = {
    "w": np.array([0.5, -1.0, 2.0, -0.0], dtype=np.float32),
    "b": np.array([-0.0, 3.0], dtype=np.float32),
}
UPDATES = [[0.25, -0.125, 0.0, 0.0], [-0.5, 0.0625, 0.75, 0.0]]
SPOKEN = [[True, True, False, False], [True, True, True, False]]


def mean(round: int, total: float = 1.0, count: int = 4) -> Mean:
    weights = np.array(SPOKEN[round]) * total
    return Mean({"w": np.array(UPDATES[round])}, {"w": weights}, total, count)


def bits(state: State) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in state.items()}


def two_rounds(step: ServerStep) -> list[tuple[State, State]]:
    """The state and the memory after each round."""
    state, memory, found = STATE, step.initial(STATE), []
    for round in range(2):
        state, memory = step.apply(state, mean(round), {}, memory)
        found.append((state, memory))
    return found


def test_a_move_of_one_adds_the_mean() -> None:
    state, memory = Move().apply(STATE, mean(0), {}, {})
    assert state["w"].tolist() == [0.75, -1.125, 2.0, 0.0]
    assert state["w"].dtype == np.float32
    assert np.signbit(state["w"][3])
    assert bits(state)["b"] == bits(STATE)["b"]
    assert memory == {}


def test_a_server_rate_scales_the_mean() -> None:
    assert Move(0.5).apply(STATE, mean(1), {}, {})[0]["w"].tolist() == [0.25, -0.96875, 2.375, 0.0]


def reference(config: ServerConfig, element: int) -> list[tuple[float, float, float]]:
    """(weight, m, v) of one element of "w" after each round (Reddi et al., Algorithm 2)."""
    w, m, v = float(STATE["w"][element]), 0.0, config.tau**2
    found = []
    for update, spoken in zip(UPDATES, SPOKEN, strict=True):
        delta = update[element]
        if spoken[element]:
            m = config.beta1 * m + (1 - config.beta1) * delta
            if config.optimizer == "adagrad":
                v = v + delta**2
            elif config.optimizer == "adam":
                v = config.beta2 * v + (1 - config.beta2) * delta**2
            else:
                sign = (v > delta**2) - (v < delta**2)
                v = v - (1 - config.beta2) * delta**2 * sign
            w = w + config.lr * m / (sqrt(v) + config.tau)
        found.append((w, m, v))
    return found


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "yogi"])
def test_adaptive_steps_follow_their_formulas(optimizer: str) -> None:
    config = ServerConfig(optimizer=optimizer, lr=0.1, beta1=0.5, beta2=0.75, tau=0.25)
    found = two_rounds(Adaptive(config))
    for element in range(4):
        for (state, memory), (w, m, v) in zip(found, reference(config, element), strict=True):
            assert state["w"][element] == pytest.approx(w, rel=1e-6)
            assert memory[FIRST + "w"][element] == pytest.approx(m, rel=1e-12)
            assert memory[SECOND + "w"][element] == pytest.approx(v, rel=1e-12)


def test_yogi_by_hand() -> None:
    """The first element: an update of 1/4 leaves v = 1/16 as it is, one of 1/2 adds a quarter of 1/4."""
    config = ServerConfig(optimizer="yogi", lr=1.0, beta1=0.0, beta2=0.75, tau=0.25)
    (first, memory), (second, later) = two_rounds(Adaptive(config))
    assert memory[SECOND + "w"][0] == 0.0625
    assert first["w"][0] == 1.0  # 0.5 + 0.25 / (0.25 + 0.25)
    assert later[SECOND + "w"][0] == 0.125
    assert second["w"][0] == np.float32(1.0 - 0.5 / (sqrt(0.125) + 0.25))


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "yogi"])
def test_what_nobody_speaks_for_keeps_bits_and_moments(optimizer: str) -> None:
    step = Adaptive(ServerConfig(optimizer=optimizer))
    start = step.initial(STATE)
    (first, memory), (second, later) = two_rounds(step)
    for state, kept, quiet in ((first, memory, slice(2, 4)), (second, later, slice(3, 4))):
        assert state["w"][quiet].tobytes() == STATE["w"][quiet].tobytes()
        assert bits(state)["b"] == bits(STATE)["b"]
        for moment in (FIRST, SECOND):
            assert kept[moment + "w"][quiet].tobytes() == start[moment + "w"][quiet].tobytes()
            assert bits(kept)[moment + "b"] == bits(start)[moment + "b"]
    assert bits(start) == bits(step.initial(STATE))  # the memory before is not changed


def test_moments_go_on_where_an_update_is_zero() -> None:
    """Zero is an answer, silence is none."""
    step = Adaptive(ServerConfig(optimizer="adam", beta1=0.5))
    state, memory = step.apply(STATE, mean(0), {}, step.initial(STATE))
    silent = Mean({"w": np.zeros(4)}, {"w": np.ones(4)}, 1.0, 4)
    after, later = step.apply(state, silent, {}, memory)
    assert later[FIRST + "w"][:2].tolist() == (memory[FIRST + "w"][:2] / 2).tolist()
    assert (after["w"][:2] != state["w"][:2]).all()


ALPHA, CLIENTS = 0.5, 4


def test_feddyn_with_all_participants() -> None:
    """h = h - alpha/N sum of updates;  w = mean of the clients' weights - h/alpha."""
    found = two_rounds(FedDyn(ALPHA, CLIENTS))
    for element in range(4):
        w, h = float(STATE["w"][element]), 0.0
        for (state, memory), update, spoken in zip(found, UPDATES, SPOKEN, strict=True):
            if spoken[element]:
                h = h - ALPHA / CLIENTS * (CLIENTS * update[element])
                w = (w + update[element]) - h / ALPHA
            assert memory[DYNAMIC + "w"][element] == h
            assert state["w"][element] == w
        assert w != STATE["w"][element] or element == 3
    assert bits(found[-1][0])["b"] == bits(STATE)["b"]


def test_feddyn_counts_who_spoke_for_an_element() -> None:
    """Two of four clients take part, and one of them speaks for the second element."""
    found = Mean({"w": np.array([0.5, 0.5, 0.0, 0.0])}, {"w": np.array([1.0, 0.5, 0.0, 0.0])}, 1.0, 2)
    step = FedDyn(ALPHA, CLIENTS)
    state, memory = step.apply(STATE, found, {}, step.initial(STATE))
    assert memory[DYNAMIC + "w"].tolist() == [-ALPHA / 4 * 2 * 0.5, -ALPHA / 4 * 0.5, 0.0, 0.0]
    assert state["w"].tolist() == [0.5 + 0.5 + 0.25, -1.0 + 0.5 + 0.125, 2.0, 0.0]
    assert np.signbit(state["w"][3])


def test_the_server_variate_grows_by_the_sum_over_all_clients() -> None:
    step = Controlled(Move(), clients=8)
    memory = step.initial(STATE)
    assert step.published(memory).keys() == {CONTROL + "w", CONTROL + "b"}
    assert not any(array.any() for array in memory.values())
    for round, expected in enumerate(([0.125, -0.25, 0.0, 0.0], [0.25, -0.5, 0.0, 0.0])):
        state, memory = step.apply(STATE, mean(round), {"w": np.array([1.0, -2.0, 0.0, 0.0])}, memory)
        assert bits(state) == bits(Move().apply(STATE, mean(round), {}, {})[0])
        assert memory[CONTROL + "w"].tolist() == expected
        assert memory[CONTROL + "w"].dtype == np.float32
        assert not memory[CONTROL + "b"].any()


def test_a_variate_stands_beside_moments() -> None:
    adam = Adaptive(ServerConfig(optimizer="adam"))
    step = Controlled(adam, clients=2)
    assert step.published(step.initial(STATE)).keys() == {CONTROL + key for key in STATE}
    state, memory = step.apply(STATE, mean(0), {"w": np.ones(4)}, step.initial(STATE))
    plain, moments = adam.apply(STATE, mean(0), {}, adam.initial(STATE))
    assert bits(state) == bits(plain)
    assert {key: memory[key].tobytes() for key in moments} == bits(moments)
    assert memory[CONTROL + "w"].tolist() == [0.5] * 4


def test_what_is_measured_becomes_its_plain_mean() -> None:
    """Running statistics: nobody descends along them, and a variance that overshoots is none."""
    state = STATE | {"var": np.array([1.0, 0.5, -0.0], dtype=np.float32)}
    found = mean(0)
    found = Mean(
        found.updates | {"var": np.array([-0.75, 0.25, 0.0])},
        found.weights | {"var": np.array([1.0, 0.5, 0.0])},
        found.total,
        found.count,
    )
    inner = FedDyn(ALPHA, CLIENTS)
    step = OnParameters(inner, frozenset({"var"}))
    after, memory = step.apply(state, found, {}, step.initial(state))
    alone, expected = inner.apply(STATE, mean(0), {}, inner.initial(STATE))
    assert bits(after) == bits(alone) | {"var": np.array([0.25, 0.75, -0.0], dtype=np.float32).tobytes()}
    assert bits(memory) == bits(expected)


def test_a_variate_is_published_through_it() -> None:
    step = OnParameters(Controlled(Move(), clients=2), frozenset({"b"}))
    memory = step.initial(STATE)
    assert step.published(memory).keys() == {CONTROL + "w"}
    _, memory = step.apply(STATE, mean(0), {"w": np.ones(4)}, memory)
    assert memory[CONTROL + "w"].tolist() == [0.5] * 4


def digits(folder: Path, *overrides: str) -> tuple[Config, Plan]:
    config = tiny(folder, *overrides)
    return config, make_plan(config, ((1, 8, 8), 10))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Move(1.0)),
        (["server.lr=0.5"], Move(0.5)),
        (["server.optimizer=yogi", "server.tau=0.5"], Adaptive(ServerConfig(optimizer="yogi", tau=0.5))),
        (["train.correction.name=feddyn", "train.correction.alpha=0.5"], FedDyn(0.5, 8)),
        (["train.correction.name=scaffold", "train.momentum=0"], Controlled(Move(1.0), 8)),
        (
            ["train.correction.name=scaffold", "train.momentum=0", "server.optimizer=adam"],
            Controlled(Adaptive(ServerConfig(optimizer="adam")), 8),
        ),
    ],
)
def test_the_configuration_names_the_step(tmp_path: Path, overrides: list[str], expected: ServerStep) -> None:
    assert server_step(*digits(tmp_path, *overrides)) == expected
    config, plan = digits(tmp_path, "model.norm=per_level", *overrides)
    assert server_step(config, plan) == OnParameters(expected, plan.measured)
    assert plan.measured == {key for key in plan.initial_state(read(plan.model.build())) if "running_" in key}


def test_a_servers_optimizer_leaves_running_statistics_alone(tmp_path: Path) -> None:
    """After one round they are those of plain averaging, bit for bit; the weights are not."""
    states = {}
    for name in ("none", "adam"):
        everybody = ("clients.per_round=8", "rounds=1", "model.norm=per_level")
        config = tiny(tmp_path, *everybody, f"server.optimizer={name}")
        run_here(config, tmp_path / name)
        progress = RunFolder(tmp_path / name).load(config)
        assert progress is not None
        states[name] = progress.state
    same = {key for key in states["none"] if states["none"][key].tobytes() == states["adam"][key].tobytes()}
    assert same == {key for key in states["none"] if "running_" in key}
