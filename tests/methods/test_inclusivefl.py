"""InclusiveFL: whose tensors are whose, and what momentum distillation makes of the mean update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster_fl.aggregation.nested import Mean, moved
from cluster_fl.aggregation.server import Move
from cluster_fl.compose import compose
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, make_plan, prepare
from cluster_fl.methods.inclusivefl import MomentumDistillation, sources
from cluster_fl.nesting.extraction import read
from cluster_fl.nesting.plan import Plan
from cluster_fl.rounds import Round
from cluster_fl.training.cohort import form
from cluster_fl.training.worker import Worker
from tests.tiny import assigned, outcome, round_of, run_here, select, tiny, worker_of
from tests.tiny import results as run_phase

DEPTHS = "levels.pairs=[{depth: 1}, {depth: 2}, {}]"
INCLUSIVE = ("method=inclusivefl", DEPTHS)
DIGITS = ((1, 8, 8), 10)


def deep(*overrides: str) -> Plan:
    """Three stages of three units, 4, 8 and 16 channels; levels of 1, 3 and 9 units."""
    given = (
        "method=inclusivefl",
        "clients.count=10",
        "model.name=resnet20",
        "model.options={widths: [4, 8, 16]}",
        "levels.pairs=[{depth: 1}, {depth: 3}, {}]",
    )
    return make_plan(compose([], (*given, *overrides)), DIGITS)


def test_heads_and_last_units_exist_once_a_level(tmp_path: Path) -> None:
    plan = make_plan(tiny(tmp_path, *INCLUSIVE), DIGITS)
    state = plan.initial_state(read(plan.model.build()))
    assert [level.submodel.exits for level in plan.levels] == [(1,), (2,), (3,)]
    for level in plan.levels:
        keys = [key.partition("/") for key in state if key.startswith(f"level.{level.number}/")]
        head = "head" if level.number == 3 else f"exits.{level.depth}"
        parts = {
            ".".join(name.split(".")[: head.count(".") + 1]) for _, _, name in keys if "units" not in name
        }
        units = {name.split(".")[1] for _, _, name in keys if name.startswith("units.")}
        assert (parts, units) == ({head}, {str(level.depth - 1)})
    # Unit 0 is level 1's own and shared by the deeper ones; unit 1 is level 2's own, and level 3's.
    shared = {key for key in state if not key.startswith("level.")}
    assert {key.split(".")[1] for key in shared if key.startswith("units.")} == {"0", "1"}
    assert not any(key.startswith(("exits.", "head.", "units.2.")) for key in shared)
    assert state["level.1/units.0.conv1.weight"].tobytes() == state["units.0.conv1.weight"].tobytes()


def merged(made: Experiment, round: Round, worker: Worker) -> dict[str, np.ndarray]:
    cohorts = form(round, assigned(round, made.allocation, made.rule), made.program, False)
    phases = made.merge.phases(round, cohorts)
    phase = next(phases)
    results = run_phase(phase, worker)
    with pytest.raises(StopIteration) as end:
        phases.send(results)
    state: dict[str, np.ndarray] = end.value.value.state
    return state


def test_all_shared_and_beta_0_is_the_mean_over_depth_prefixes(tmp_path: Path) -> None:
    made = prepare(tiny(tmp_path, *INCLUSIVE, "options.beta=0", "options.own_unit=false", "rounds=1"))
    round, worker = select(round_of(made)), worker_of(made)
    found = merged(made, round, worker)
    assert not any(key.startswith("level.") for key in round.state)
    cohorts = form(round, assigned(round, made.allocation, made.rule), made.program, True)
    weight = dict.fromkeys(round.state, 0.0)
    total = {key: np.zeros(array.shape) for key, array in round.state.items()}
    for cohort in cohorts:
        for update in cohort.updates(worker, round.state):
            samples = len(made.population.shares.train[update.client])
            for name, delta in update.deltas.items():
                weight[name] += samples
                total[name] += samples * delta
    held = {key for key, sum_ in weight.items() if sum_}
    assert held
    for key, array in round.state.items():
        expected = array + total[key] / weight[key] if key in held else array
        np.testing.assert_allclose(found[key], expected, rtol=1e-6, atol=1e-9)


def test_sources_are_the_units_that_the_larger_level_has_more() -> None:
    plan = deep()
    name = "conv1.weight"
    found = sources(plan, overlap=False)
    assert found[f"level.1/units.0.{name}"] == [f"units.1.{name}", f"level.2/units.2.{name}"]
    # Level 2 ends its stage: no unit that level 3 has more has a tensor of its last unit's shapes.
    assert {key[:8] for key in found} == {"level.1/"}
    assert {key.partition("/")[2] for key in found} == {
        f"units.0.{leaf}"
        for leaf in ("conv1.weight", "conv2.weight", "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")
    }
    wider = sources(plan, overlap=True)
    assert wider[f"level.1/units.0.{name}"] == [f"units.0.{name}", *found[f"level.1/units.0.{name}"]]
    assert wider[f"level.2/units.2.{name}"] == [f"units.2.{name}"]


def test_running_statistics_do_not_mix() -> None:
    assert not [key for key in sources(deep("model.norm=per_level"), True) if "running" in key]
    # With norms a level the sources lie where the larger level keeps its own.
    found = sources(deep("model.norm=per_level"), False)["level.1/units.0.bn1.weight"]
    assert found == ["level.2/units.1.bn1.weight", "level.2/units.2.bn1.weight"]


def test_the_step_equals_a_computation_by_hand() -> None:
    plan, rng = deep(), np.random.default_rng(0)
    state = plan.initial_state(read(plan.model.build()))
    updates = {key: rng.normal(size=array.shape) for key, array in state.items()}
    weights = {key: np.full(array.shape, 0.5) for key, array in state.items()}
    mean = Mean(updates, weights, 1.0, 4)
    step = MomentumDistillation(Move(), 0.2, sources(plan, overlap=False))
    after, memory = step.apply(state, mean, {}, step.initial(state))
    assert memory == {}
    key = "units.0.conv2.weight"
    larger = (updates["units.1.conv2.weight"] + updates["level.2/units.2.conv2.weight"]) / 2
    expected = state[f"level.1/{key}"] + 0.8 * updates[f"level.1/{key}"] + 0.2 * larger
    np.testing.assert_allclose(after[f"level.1/{key}"], expected, rtol=1e-6, atol=1e-7)
    plain = moved(state, updates)
    untouched = [key for key in state if not key.startswith("level.1/units.")]
    assert all(after[key].tobytes() == plain[key].tobytes() for key in untouched)


@pytest.mark.parametrize("silent", ["own", "one source", "all sources"])
def test_who_did_not_train_neither_teaches_nor_learns(silent: str) -> None:
    plan, rng = deep(), np.random.default_rng(1)
    state = plan.initial_state(read(plan.model.build()))
    own, first, second = (
        "level.1/units.0.conv1.weight",
        "units.1.conv1.weight",
        "level.2/units.2.conv1.weight",
    )
    quiet = {"own": [own], "one source": [second], "all sources": [first, second]}[silent]
    updates = {
        key: rng.normal(size=array.shape) for key, array in state.items() if key not in quiet or key == own
    }
    weights = {key: np.full(update.shape, 0.0 if key in quiet else 0.5) for key, update in updates.items()}
    updates |= {key: np.zeros(state[key].shape) for key in quiet if key in updates}
    step = MomentumDistillation(Move(), 0.2, sources(plan, overlap=False))
    after, _ = step.apply(state, Mean(updates, weights, 1.0, 4), {}, {})
    expected = {
        "own": lambda: state[own],
        "one source": lambda: state[own] + 0.8 * updates[own] + 0.2 * updates[first],
        "all sources": lambda: state[own] + updates[own],
    }[silent]()
    np.testing.assert_allclose(after[own], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("overrides", [(), ("variant=released",), ("model.norm=per_level",)])
def test_a_run_of_it_goes_through(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run_here(tiny(tmp_path, *INCLUSIVE, "rounds=1", *overrides), tmp_path / "run")
    records, summary = outcome(tmp_path / "run")
    assert np.isfinite(records[0]["train_loss"])
    assert len(summary["accuracy"]["levels"]) == 3


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("levels.pairs=[{depth: 2}, {depth: 2}, {}]",), "levels.pairs"),
        (("levels.pairs=null", "levels.ratios=[0.9,0.95,1]", "levels.tolerance=0.3"), "levels.tolerance"),
        (("options.own_unit=false",), "options.beta"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(tiny(tmp_path, *INCLUSIVE, *overrides), DIGITS)
    assert caught.value.key == key
