"""ScaleFL's options.channels: any order of the channels, of which levels keep the first, nested as before."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.experiment import make_plan
from cluster_fl.nesting.extraction import extract, read
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.submodel import Channels
from cluster_fl.nesting.windows import leading, outward, reverse, rolled
from tests.nesting.test_submodels import masked
from tests.tiny import outcome, run_here, tiny

DIGITS = ((1, 8, 8), 10)


def planned(folder: Path, channels: str, *overrides: str) -> Plan:
    return make_plan(tiny(folder, f"options.channels={channels}", *overrides), DIGITS)


def held(channels: Channels) -> list[int]:
    return list(range(channels)) if isinstance(channels, int) else list(channels)


@given(size=st.integers(1, 50), shift=st.integers(-100, 100))
def test_orders_are_permutations(size: int, shift: int) -> None:
    for order in (rolled(size, shift), reverse(size), outward(size)):
        assert sorted(order.tolist()) == list(range(size))


@given(size=st.integers(1, 50), data=st.data())
def test_the_middle_is_one_run_as_near_to_the_centre_as_it_can_be(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    chosen = held(leading(outward(size), count))
    assert chosen == list(range(chosen[0], chosen[0] + count))
    assert abs(chosen[0] - (size - count) / 2) <= 0.5


@pytest.mark.parametrize(
    ("channels", "expected"),
    [("first", 8), ("last", tuple(range(8, 16))), ("middle", tuple(range(4, 12)))],
)
def test_which_channels(channels: str, expected: Channels, tmp_path: Path) -> None:
    plan = planned(tmp_path, channels)
    widest = [at for at, group in enumerate(plan.anatomy.groups) if group.size == 16]
    assert widest
    assert {plan.level(2).submodel.channels[at] for at in widest} == {expected}
    assert all(isinstance(kept, int) for kept in plan.level(3).submodel.channels)


def test_first_is_what_it_always_was(tmp_path: Path) -> None:
    default = make_plan(tiny(tmp_path), DIGITS)
    assert planned(tmp_path, "first").levels == default.levels
    assert all(isinstance(kept, int) for level in default.levels for kept in level.submodel.channels)


def test_random_channels_follow_from_the_seed(tmp_path: Path) -> None:
    plan, again, other = (planned(tmp_path, "random", f"seed={seed}") for seed in (0, 0, 1))
    assert plan.levels == again.levels
    assert plan.levels != other.levels
    chosen = plan.level(2).submodel.channels
    assert len(set(chosen)) > len({group.size for group in plan.anatomy.groups})  # each group its own


@pytest.mark.parametrize("channels", ["last", "middle", "random"])
def test_levels_stay_nested_and_cost_the_same(channels: str, tmp_path: Path) -> None:
    widths = "levels.pairs=[{width: 0.25, depth: 1}, {width: 0.6, depth: 2}, {}]"
    plan, first = (planned(tmp_path, name, widths) for name in (channels, "first"))
    assert plan.as_json() == first.as_json()
    for small, large in pairwise(plan.levels):
        for inner, outer in zip(small.submodel.channels, large.submodel.channels, strict=True):
            assert set(held(inner)) <= set(held(outer))
    model = plan.model.build()
    for level in plan.levels:
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        small_model = extract(model, plan.anatomy, level.submodel).double()
        whole = masked(model, plan.anatomy, level.submodel).double()
        with torch.no_grad():
            for ours, theirs in zip(small_model(x), whole(x), strict=False):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_norms_of_a_levels_own_start_as_its_channels_do(tmp_path: Path) -> None:
    plan = planned(tmp_path, "last", "model.norm=per_level", "model.options.widths=[4,8,16]")
    weights = {
        name: array + np.arange(array.size).reshape(array.shape) for name, array in _read(plan).items()
    }
    state = plan.initial_state(weights)
    np.testing.assert_array_equal(state["level.2/units.0.bn1.weight"], weights["units.0.bn1.weight"][2:])


def _read(plan: Plan) -> dict[str, np.ndarray]:
    return read(plan.model.build())


def test_a_run_with_random_channels(tmp_path: Path) -> None:
    digests = {}
    for channels, size in (("random", 1), ("random", 3), ("first", 3)):
        config = tiny(tmp_path, f"options.channels={channels}", f"train.cohort_size={size}", "rounds=2")
        run_here(config, tmp_path / f"{channels}{size}")
        digests[channels, size] = outcome(tmp_path / f"{channels}{size}")[1]["weights_sha256"]
    assert digests["random", 1] == digests["random", 3] != digests["first", 3]
