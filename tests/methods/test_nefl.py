"""NeFL: its submodels, step sizes, inconsistent parameters, and what its released code gets wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster_fl.aggregation.nested import CoverageMean, PartialSum, moved
from cluster_fl.compose import compose
from cluster_fl.errors import UserError
from cluster_fl.experiment import make_plan
from cluster_fl.methods.nefl_tables import SPLITS
from cluster_fl.nesting.extraction import read
from cluster_fl.nesting.plan import Plan
from tests.tiny import outcome, run_here, tiny

NEFL = ("method=nefl", "levels.pairs=[{width: 0.5, keep: [0]}, {width: 0.5, keep: [0, 2]}, {}]")
CIFAR = ((3, 32, 32), 10)


def planned(tmp_path: Path, *overrides: str) -> Plan:
    return make_plan(tiny(tmp_path, *NEFL, *overrides), ((1, 8, 8), 10))


def published(*overrides: str) -> Plan:
    cluster = ("method=nefl", "clients.count=10", "clients.per_round=1", "levels.count=5")
    return make_plan(compose([], (*cluster, *overrides)), CIFAR)


@pytest.mark.parametrize("split", ["W", "D", "WD"])
def test_the_tables_submodels_are_the_plan(split: str) -> None:
    plan = published("model.name=resnet56", f"options.split={split}")
    table = SPLITS["resnet56", split]
    assert [(level.width, level.submodel.units) for level in plan.levels] == [
        (row.width, row.keep) for row in table
    ]
    # 27 blocks have a step size each, one a kept block.
    steps = [sum(name.endswith(".step") for name in plan.holding(number).keys) for number in range(1, 6)]
    assert steps == [len(row.keep) for row in table]


def test_fixed_steps_of_one_are_no_parameters() -> None:
    assert not [
        name
        for name in published("model.name=resnet56", "options.steps=fixed").anatomy.shapes
        if "step" in name
    ]


def test_the_ode_start_is_the_papers() -> None:
    """D_O of ResNet110 with 2 of 9 would be [1, 8]; of ResNet34's D: 3, 4, 6, 3 for one kept of each stage."""
    thirty_four = published(
        "model.name=resnet34", "model.options={stem: cifar}", "options.split=D", "options.ode_init=true"
    )
    state = thirty_four.initial_state(read(thirty_four.model.build()))
    assert [state[f"level.1/units.{unit}.step"].item() for unit in (0, 3, 7, 13)] == [3, 4, 6, 3]
    fifty_six = published("model.name=resnet56", "options.split=D", "options.ode_init=true")
    state = fifty_six.initial_state(read(fifty_six.model.build()))
    assert [state[f"level.1/units.{unit}.step"].item() for unit in (0, 1, 9, 10, 18, 19)] == [1, 8] * 3
    assert [state[f"level.2/units.{unit}.step"].item() for unit in (0, 1, 2)] == [1, 1, 7]
    assert [state[f"level.5/units.{unit}.step"].item() for unit in range(27)] == [1] * 27


def test_the_printed_table_differs_where_it_is_said_to() -> None:
    model = ("model.name=resnet18", "model.options={stem: cifar}", "options.split=D")
    assert published(*model).levels[1].submodel.units == (0, 1, 2, 3, 6)
    assert published(*model, "variant=paper").levels[1].submodel.units == (0, 4, 6)


def _sum(plan: Plan, level: int, value: float, clients: int) -> PartialSum:
    holding, state = plan.holding(level), plan.initial_state(read(plan.model.build()))
    part = PartialSum.of(holding, state)
    for _ in range(clients):
        deltas = {name: np.full(a.shape, value) for name, a in holding.gather(state).items()}
        assert part.add(holding, deltas, 2.0**-4)
    return part


def test_the_papers_worked_example() -> None:
    """Section IV-B: a block in submodels 1, 3 and 5 of rising width, trained by 2, 3 and 2 clients."""
    keeps = [[0, 1, 2], [0, 2], [0, 1, 2], [0, 2], [0, 1, 2]]
    pairs = ", ".join(
        f"{{width: {w}, keep: {k}}}" for w, k in zip((0.25, 0.375, 0.5, 0.75, 1.0), keeps, strict=True)
    )
    cluster = ("method=nefl", "clients.count=10", "clients.per_round=1", f"levels.pairs=[{pairs}]")
    plan = make_plan(
        compose([], (*cluster, "model.name=resnet8", "model.options={widths: [8, 16, 32]}")), ((1, 8, 8), 10)
    )
    state = plan.initial_state(read(plan.model.build()))
    mean = CoverageMean(state)
    for level, value, clients in ((1, 1.0, 2), (3, 2.0, 3), (5, 4.0, 2)):
        mean.add(_sum(plan, level, value, clients))
    update = mean.result().updates["units.1.conv2.weight"]  # 16 x 16
    weights = mean.result().weights["units.1.conv2.weight"] * 2.0**4
    rings = [
        (slice(0, 4), 7, (2 * 1 + 3 * 2 + 2 * 4) / 7),
        (slice(4, 8), 5, (3 * 2 + 2 * 4) / 5),
        (slice(8, 16), 2, 4.0),
    ]
    for channels, count, value in rings:
        assert (weights[channels, 0] == count).all()
        np.testing.assert_allclose(update[channels, 0], value, rtol=1e-12)


def test_blocks_that_nobody_trained_keep_their_bits(tmp_path: Path) -> None:
    """The released code sets them to zero."""
    plan = planned(tmp_path)
    state = plan.initial_state(read(plan.model.build()))
    mean = CoverageMean(state)
    mean.add(_sum(plan, 1, 0.5, 3))
    mean.add(_sum(plan, 2, 0.25, 1))
    after = moved(state, mean.result().updates)
    # Unit 1 is only in submodel 3, but for its projection.
    untouched = [name for name in state if name.startswith(("units.1.conv", "level.3/"))]
    assert untouched
    assert all(after[name].tobytes() == state[name].tobytes() for name in untouched)
    # Norms and steps are averaged over the submodel's own clients.
    assert (after["level.1/stem.bn.bias"] == 0.5).all()
    assert (after["level.2/stem.bn.bias"] == 0.25).all()
    assert (after["level.1/units.0.step"] == 1.5).all()


def test_a_dropped_blocks_projection_is_trained_but_does_not_count(tmp_path: Path) -> None:
    """A run whose only participants lack block 1 leaves its projection's convolution alone, not its norm."""
    config = tiny(tmp_path, *NEFL, "levels.draw=fixed", "clients.per_round=2", "rounds=1", "seed=3")
    run_here(config, tmp_path / "run")
    participants = outcome(tmp_path / "run")[0][0]["participants"]
    assert {p["level"] for p in participants} <= {1, 2}
    from cluster_fl.records import RunFolder

    progress = RunFolder(tmp_path / "run").load(config)
    assert progress is not None
    plan = planned(tmp_path, "seed=3")
    first = plan.initial_state(read(plan.model.build()))
    assert (
        progress.state["units.1.shortcut.conv.weight"].tobytes()
        == first["units.1.shortcut.conv.weight"].tobytes()
    )
    trained = {p["level"] for p in participants}
    for level in (1, 2):
        norm = f"level.{level}/units.1.shortcut.bn.weight"
        assert (progress.state[norm].tobytes() != first[norm].tobytes()) == (level in trained)
    assert progress.state["units.0.conv1.weight"].tobytes() != first["units.0.conv1.weight"].tobytes()


def test_frozen_steps_stay_what_they_were(tmp_path: Path) -> None:
    from cluster_fl.records import RunFolder

    options = ("options.steps=fixed", "options.ode_init=true", "rounds=1")
    config = tiny(tmp_path, *NEFL, *options)
    run_here(config, tmp_path / "run")
    progress = RunFolder(tmp_path / "run").load(config)
    assert progress is not None
    plan = planned(tmp_path, *options)
    first = plan.initial_state(read(plan.model.build()))
    steps = [name for name in first if name.endswith(".step")]
    assert len(steps) == 1 + 2 + 3
    assert all(progress.state[name].tobytes() == first[name].tobytes() for name in steps)
    learnt = replace(config, options=replace(config.options, steps="learnt"))
    run_here(learnt, tmp_path / "learnt")
    progress = RunFolder(tmp_path / "learnt").load(learnt)
    assert progress is not None
    assert any(progress.state[name].tobytes() != first[name].tobytes() for name in steps)


@pytest.mark.parametrize("split", ["W", "D", "WD"])
def test_budgets_are_met(split: str) -> None:
    plan = published(
        "model.name=resnet20", f"options.split={split}", "levels.count=4", "levels.ratios=[0.35,0.5,0.7,1]"
    )
    for level, ratio in zip(plan.levels, (0.35, 0.5, 0.7, 1.0), strict=True):
        assert level.ratio <= 1.1 * ratio
    if split == "WD":
        assert all(
            abs(level.ratio / ratio - 1) <= 0.1
            for level, ratio in zip(plan.levels, (0.35, 0.5, 0.7, 1), strict=True)
        )
    if split == "W":
        assert all(level.depth == 9 for level in plan.levels)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("options.split=WDX", "model.name=resnet56"), "options.split"),
        (("model.name=resnet20",), "options.split"),
        (("model.name=resnet56", "levels.count=4"), "levels.count"),
        (("model.name=mlp", "levels.pairs=[{keep: [0]}, {}]", "levels.count=2"), "model.name"),
        (("model.name=resnet20", "levels.pairs=[{keep: [11]}, {}]"), "levels.pairs"),
        (("model.name=resnet20", "levels.ratios=[0.0001,1]"), "levels.tolerance"),
    ],
)
def test_what_cannot_be_is_one_line(overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(UserError) as caught:
        published(*overrides)
    assert caught.value.key == key
