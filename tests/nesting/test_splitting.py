"""Splits along one axis and kept units, against modules that are really extracted and counted by fvcore."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.config import GridConfig, LevelsConfig, PairConfig
from cluster_fl.errors import UserError
from cluster_fl.experiment import make_plan
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.cost import Cost, count
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.splitting import DEPTH, WIDTH, keep_units, split, width_grid
from cluster_fl.nesting.submodel import prefix
from cluster_fl.nesting.tracing import anatomy
from tests.tiny import tiny

# Units of 4, 8 and 16 channels, two of each; at 8x8, 4x4 and 2x2.
SPEC = ModelSpec("resnet14", (1, 8, 8), 10, seed=0, options={"widths": [4, 8, 16]})
UNITS, STEP = 6, 0.125


@functools.cache
def counted(width: float, depth: int, exits: tuple[int, ...]) -> Cost:
    """fvcore's count of the extracted module."""
    spec = SPEC.with_exits(tuple(p for p in exits if p < UNITS))
    traced = anatomy(spec.skeleton(), spec.input_shape)
    return count(extract(spec.build(), traced, prefix(traced, width, depth, exits)), spec.input_shape)


PLAIN = counted(1.0, UNITS, (UNITS,))


def share(cost: Cost, metric: str) -> float:
    """Of the plain full model; the larger one where both count."""
    names = ("params", "macs") if metric == "both" else (metric,)
    return max(float(getattr(cost, name) / getattr(PLAIN, name)) for name in names)


def config(metric: str, ratios: list[float], tolerance: float = 0.1) -> LevelsConfig:
    return LevelsConfig(ratios=ratios, metric=metric, tolerance=tolerance, grid=GridConfig(width_step=STEP))


def costs_are_real(plan: Plan) -> None:
    for level in plan.levels:
        module = extract(plan.model.build(), plan.anatomy, level.submodel)
        assert level.cost == count(module, plan.model.input_shape)


METRICS = ["params", "macs", "both"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.4])
def test_widths_are_the_largest_within_the_budget(metric: str, tolerance: float) -> None:
    ratios = [0.3, 0.6, 1.0]
    plan = split(SPEC, config(metric, ratios, tolerance), np.array([1, 2, 3]), WIDTH)
    each = {width: share(counted(float(width), UNITS, (UNITS,)), metric) for width in width_grid(STEP)}
    for level, ratio in zip(plan.levels, ratios, strict=True):
        within = [width for width, own in each.items() if own <= ratio * (1 + tolerance) * (1 + 1e-12)]
        assert (level.width, level.depth) == (max(within), UNITS)
        assert level.submodel.exits == (UNITS,)
    assert plan.levels[-1].cost == PLAIN
    costs_are_real(plan)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nested_exits", [True, False])
def test_depths_are_the_largest_within_the_budget(metric: str, nested_exits: bool) -> None:
    """A level's cost has the heads of the levels below where it answers there too."""
    ratios = [0.5, 0.9, 1.0]
    plan = split(SPEC, config(metric, ratios), np.array([1, 2, 3]), DEPTH, nested_exits=nested_exits)
    lower: list[int] = []
    for level, ratio in zip(plan.levels[:-1], ratios, strict=False):
        within = []
        for depth in range(1, UNITS):
            exits = sorted({*(p for p in lower if nested_exits and p <= depth), depth})
            own = counted(1.0, depth, tuple(exits))
            if share(own, metric) <= 1.1 * ratio and depth >= max(lower, default=0):
                within.append((getattr(own, "params" if metric == "both" else metric), depth))
        assert (level.width, level.depth) == (1.0, max(within)[1])
        assert level.budgeted == max(within)[0]
        lower.append(level.depth)
    answers = [{p for p in (*lower, UNITS) if p <= level.depth} for level in plan.levels]
    assert [set(level.submodel.exits) for level in plan.levels] == (
        answers if nested_exits else [{level.depth} for level in plan.levels]
    )
    costs_are_real(plan)


def test_a_level_is_no_shallower_than_the_one_below() -> None:
    levels = LevelsConfig(ratios=[0.6, 0.6, 0.65, 1.0], grid=GridConfig(width_step=STEP))
    depths = [level.depth for level in split(SPEC, levels, np.array([1, 2, 3, 4]), DEPTH).levels]
    assert depths == sorted(depths)


@pytest.mark.parametrize("axes", [WIDTH, DEPTH])
def test_a_budget_below_everything_is_refused(axes: str) -> None:
    levels = LevelsConfig(ratios=[0.001, 1.0], tolerance=0.1)
    with pytest.raises(UserError, match=r"level 1 .*down to its budget.*Nearest.*width"):
        split(SPEC, levels, np.array([1, 2]), axes)


@pytest.mark.parametrize(
    ("axes", "pairs", "told"),
    [
        (WIDTH, [PairConfig(0.5, 3), PairConfig(1.0)], "only varies the width"),
        (DEPTH, [PairConfig(0.5, 3), PairConfig(1.0)], "only varies the depth"),
        (DEPTH, [PairConfig(1.0, keep=[0]), PairConfig(1.0)], "give a depth"),
    ],
)
def test_pairs_must_lie_on_the_axis(axes: str, pairs: list[PairConfig], told: str) -> None:
    with pytest.raises(UserError, match=told):
        split(SPEC, LevelsConfig(pairs=pairs), np.array([1, 2]), axes)


def test_given_widths_need_no_depth() -> None:
    plan = split(SPEC, LevelsConfig(pairs=[PairConfig(0.25), PairConfig(1.0)]), np.array([1, 2]), WIDTH)
    assert [(level.width, level.depth) for level in plan.levels] == [(0.25, UNITS), (1.0, UNITS)]
    costs_are_real(plan)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.25, 0.6]), st.sets(st.integers(0, UNITS - 1))), max_size=2),
    st.sampled_from(METRICS),
    st.sampled_from(["floor", "ceil"]),
)
def test_kept_units_cost_what_fvcore_counts(
    chosen: list[tuple[float, set[int]]], metric: str, rounding: str
) -> None:
    """Any units, also those that change the shape, of which the shortcut stays."""
    traced = anatomy(SPEC.skeleton(), SPEC.input_shape)
    given = [*((width, sorted(units)) for width, units in chosen), (1.0, list(range(UNITS)))]
    levels = keep_units(traced, given, LevelsConfig(metric=metric, rounding=rounding))
    assert [level.number for level in levels] == list(range(1, len(given) + 1))
    assert levels[-1].cost == PLAIN
    for level, (width, units) in zip(levels, given, strict=True):
        real = count(extract(SPEC.build(), traced, level.submodel), SPEC.input_shape)
        assert level.cost == real
        assert level.budgeted == getattr(real, "macs" if metric == "macs" else "params")
        assert level.ratio == level.budgeted / levels[-1].budgeted
        assert (level.width, level.depth) == (width, len(units))
        assert (level.submodel.units, level.submodel.exits) == (tuple(units), (UNITS,))
        smallest = traced.groups[0].size * width
        assert level.submodel.channels[0] == int(
            np.floor(smallest) if rounding == "floor" else np.ceil(smallest)
        )


def test_a_share_of_zero_is_a_level_that_only_the_server_has(tmp_path: Path) -> None:
    plan = make_plan(tiny(tmp_path, "levels.shares=[0.5,0.5,0]"), ((1, 8, 8), 10))
    assert np.bincount(plan.level_of, minlength=4).tolist() == [0, 4, 4, 0]
    assert len(plan.levels) == plan.global_level == 3
