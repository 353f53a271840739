"""What a level holds of the state, and that the state is what the levels hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster_fl.compose import compose
from cluster_fl.config import LevelsConfig, PairConfig
from cluster_fl.experiment import make_plan
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.extraction import read
from cluster_fl.nesting.plan import WHOLE, Plan, State
from cluster_fl.nesting.splitting import WIDTH, split
from cluster_fl.nesting.submodel import index_map, lengths, present
from tests.conftest import CONFIGS
from tests.tiny import LEVELS, scattered, tiny

DIGITS = ((1, 8, 8), 10)
NUMBERS = range(1, LEVELS + 1)


def made(folder: Path, norm: str) -> Plan:
    return make_plan(tiny(folder, f"model.norm={norm}"), DIGITS)


@pytest.fixture(scope="module", params=["batch", "per_level", "decoupled", "also"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of shared tensors alone; with norms of each level's own; of own tensors alone; with those of lower levels."""
    folder = tmp_path_factory.mktemp("tiny")
    if request.param == "batch":
        return made(folder, "batch")
    nested = made(folder, "per_level")
    if request.param == "decoupled":
        everything = (frozenset(present(nested.anatomy, level.submodel)) for level in nested.levels)
        return replace(
            nested,
            levels=tuple(replace(v, owned=own) for v, own in zip(nested.levels, everything, strict=True)),
        )
    if request.param == "also":
        return replace(
            nested, levels=tuple(replace(v, also=tuple(range(1, v.number))) for v in nested.levels)
        )
    return nested


@pytest.fixture(scope="module")
def weights(plan: Plan) -> State:
    return read(plan.model.build())


@pytest.fixture(scope="module")
def state(plan: Plan, weights: State) -> State:
    return plan.initial_state(weights)


def is_norm(name: str) -> bool:
    return "bn" in name


def test_per_level_norms_are_owned_and_nothing_else(tmp_path: Path) -> None:
    plan = made(tmp_path, "per_level")
    assert made(tmp_path, "batch").levels[0].owned == frozenset()
    for number in NUMBERS:
        for name, key in plan.holding(number).keys.items():
            assert key == (f"level.{number}/{name}" if is_norm(name) else name)
    assert {"units.0.bn1.running_var", "exits.1.bn3.weight", "stem.bn.bias"} <= plan.levels[0].owned


def test_a_level_receives_its_own_and_its_part_of_what_is_shared(
    plan: Plan, weights: State, state: State
) -> None:
    for level in plan.levels:
        holding, index = plan.holding(level.number), index_map(plan.anatomy, level.submodel)
        assert holding.keys.keys() == holding.where.keys()
        received, shapes = holding.gather(state), lengths(plan.anatomy, level.submodel)
        assert {name: received[name].shape for name in index} == shapes
        for name, where in index.items():
            assert received[name].tobytes() == np.ascontiguousarray(weights[name][where]).tobytes()
            owned = name in level.owned
            assert holding.keys[name] == (f"level.{level.number}/{name}" if owned else name)
            assert (holding.where[name] == WHOLE) is owned
            assert np.shares_memory(received[name], state[holding.keys[name]])


def test_the_state_is_what_the_levels_hold(plan: Plan, weights: State, state: State) -> None:
    held = {key for number in NUMBERS for key in plan.holding(number).keys.values()}
    assert state.keys() == held
    for key, array in state.items():
        prefix, _, name = key.rpartition("/")
        assert (prefix != "") == any(plan.key(number, name) == key for number in NUMBERS if prefix)
        if not prefix:
            assert array.tobytes() == weights[name].tobytes()
    owners = {key: array for key, array in state.items() if "/" in key}
    for key, array in owners.items():
        assert not any(np.shares_memory(array, other) for other in state.values() if other is not array), key


def test_what_no_level_has_is_not_in_the_state(plan: Plan, weights: State) -> None:
    small = replace(plan, levels=plan.levels[:1])
    found = small.initial_state(weights)
    assert found.keys() == set(small.holding(1).keys.values())
    assert not any("units.1." in key or "head" in key for key in found)


def test_lower_levels_own_tensors_travel_with_a_higher_level(tmp_path: Path) -> None:
    """FjORD: a client also trains the norms of the smaller widths, under their keys and as a whole."""
    plain = made(tmp_path, "per_level")
    plan = replace(plain, levels=tuple(replace(v, also=tuple(range(1, v.number))) for v in plain.levels))
    state = plan.initial_state(read(plan.model.build()))
    for level in plan.levels:
        alone, holding = plain.holding(level.number), plan.holding(level.number)
        lower = {key for n in range(1, level.number) for key in plain.holding(n).keys.values() if "/" in key}
        assert holding.keys == alone.keys | {key: key for key in lower}
        assert all(holding.where[key] == WHOLE for key in lower)
        assert holding.where.items() >= alone.where.items()
        received = holding.gather(state)
        assert all(received[key] is not None and received[key].shape == state[key].shape for key in lower)
    assert len(plan.holding(3).keys) > len(plan.holding(2).keys) > len(plan.holding(1).keys)


@pytest.mark.parametrize("seed", range(3))
def test_another_submodel_holds_other_channels_of_what_is_shared(
    plan: Plan, weights: State, state: State, seed: int
) -> None:
    """And all of what its level owns, which has the level's shape."""
    for level in plan.levels:
        submodel = scattered(plan.anatomy, level.submodel, seed)
        holding, own = plan.holding(level.number, submodel), plan.holding(level.number)
        assert holding.keys == own.keys
        received = holding.gather(state)
        index = index_map(plan.anatomy, submodel)
        for name, where in index.items():
            assert received[name].shape == own.gather(state)[name].shape
            expected = state[own.keys[name]] if name in level.owned else weights[name][where]
            assert received[name].tobytes() == np.ascontiguousarray(expected).tobytes()


def test_the_plans_own_submodel_is_looked_up(plan: Plan) -> None:
    for level in plan.levels:
        assert plan.holding(level.number, replace(level.submodel)) is plan.holding(level.number)


def test_own_tensors_besides_the_norms() -> None:
    """``own`` of :func:`split` adds to what the norm policy says."""
    spec = ModelSpec("resnet8", (1, 8, 8), 10, seed=0, norm="per_level", options={"widths": [4, 8, 16]})
    levels = LevelsConfig(pairs=[PairConfig(0.5), PairConfig(1.0)])

    def heads(anatomy: object, submodel: object) -> list[str]:
        return ["head.linear.bias"]

    plan = split(spec, levels, np.array([1, 2]), WIDTH, own=heads)
    state = plan.initial_state(read(spec.build()))
    for number in (1, 2):
        assert plan.key(number, "head.linear.bias") == f"level.{number}/head.linear.bias"
        assert plan.key(number, "stem.bn.weight") == f"level.{number}/stem.bn.weight"
        assert plan.key(number, "head.linear.weight") == "head.linear.weight"
    assert "head.linear.bias" not in state


def test_the_plan_tells_how_many_clients_a_level_has() -> None:
    plan = make_plan(compose([CONFIGS / "quickstart.yaml"], ["levels.shares=[0.5,0.25,0.25,0]"]), DIGITS)
    clients = len(plan.level_of)
    told = [level["clients"] for level in plan.as_json()["levels"]]
    assert told == [clients // 2, clients // 4, clients // 4, 0]
