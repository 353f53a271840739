"""The search space: what it names, how it is drawn, and what is wrong with one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.errors import UserError
from ops.sweeping.space import Between, nested, parse


def test_grids_are_crossed() -> None:
    space = parse({"method": {"grid": ["scalefl", "heterofl"]}, "seed": {"grid": [0, 1]}})
    assert [space.settings(point) for point in space.points(1, 0)] == [
        {"method": "scalefl", "seed": 0},
        {"method": "scalefl", "seed": 1},
        {"method": "heterofl", "seed": 0},
        {"method": "heterofl", "seed": 1},
    ]


def test_draws_are_the_same_for_each_combination_and_for_more_of_them() -> None:
    space = parse({"train.lr": {"log": [0.01, 1.0]}, "method": {"grid": ["scalefl", "heterofl"]}})
    few, many = space.points(2, 5), space.points(4, 5)
    assert many[: len(few)] == few
    settings = [space.settings(point) for point in few]
    assert [one["method"] for one in settings] == ["scalefl", "heterofl"] * 2
    assert settings[0]["train.lr"] == settings[1]["train.lr"] != settings[2]["train.lr"]
    assert space.points(2, 6) != few


def test_a_list_may_hold_what_is_drawn() -> None:
    space = parse({"levels.ratios": [{"uniform": [0.1, 0.3]}, {"choice": [0.5, 0.6]}, 1.0]})
    assert [one.name for one in space.dimensions] == ["levels.ratios[0]", "levels.ratios[1]"]
    for point in space.points(20, 0):
        first, second, last = space.settings(point)["levels.ratios"]
        assert 0.1 <= first <= 0.3
        assert second in (0.5, 0.6)
        assert last == 1.0


def test_sections_are_as_good_as_dotted_keys() -> None:
    assert parse({"train": {"lr": {"log": [0.1, 1.0]}}}) == parse({"train.lr": {"log": [0.1, 1.0]}})


def test_values_may_be_sections_and_lists() -> None:
    policies = ["wait", {"name": "deadline", "deadline_s": 4.0}]
    space = parse({"time.policy": {"grid": policies}, "levels.ratios": {"grid": [[0.5, 1.0]]}})
    found = [nested(space.settings(point)) for point in space.points(1, 0)]
    assert found == [{"time": {"policy": one}, "levels": {"ratios": [0.5, 1.0]}} for one in policies]


@given(low=st.floats(1e-6, 1.0), times=st.floats(1.01, 1e6), seed=st.integers(0, 100), log=st.booleans())
def test_a_range_keeps_its_bounds(low: float, times: float, seed: int, log: bool) -> None:
    one = Between("x", low, low * times, log=log)
    assert one.low <= one.value(one.draw(np.random.default_rng(seed))) <= one.high
    assert one.value(one.high * 1.2) == one.high  # as a mutation may have it
    assert one.value(one.low * 0.8) == one.low


def test_orders_of_magnitude_are_equally_likely() -> None:
    space = parse({"train.lr": {"log": [0.0001, 1.0]}})
    drawn = [math.log10(space.settings(point)["train.lr"]) for point in space.points(400, 0)]
    assert np.histogram(drawn, 4, (-4, 0))[0].min() > 70


def test_whole_numbers() -> None:
    space = parse({"train.epochs": {"int": [1, 3]}})
    found = [space.settings(point)["train.epochs"] for point in space.points(50, 0)]
    assert set(found) == {1, 2, 3}
    assert all(type(value) is int for value in found)


def test_combinations_of_a_finite_space() -> None:
    space = parse({"seed": {"grid": [0, 1]}, "levels.tolerance": {"choice": [0.1, 0.2, 0.3]}})
    found = space.combinations(6)
    assert found is not None
    assert len({tuple(point.items()) for point in found}) == 6
    assert space.combinations(5) is None
    assert parse({"seed": {"grid": [0]}, "train.lr": {"log": [0.1, 1.0]}}).combinations(10) is None


@pytest.mark.parametrize(
    ("content", "key", "right"),
    [
        ({}, "sweep.space", "at least one setting"),
        ({"train.lr": 0.1}, "sweep.space.train.lr", "must say what to try"),
        ({"train.lr": {"grid": 0.1}}, "sweep.space.train.lr.grid", "list of values"),
        ({"train.lr": {"grid": []}}, "sweep.space.train.lr.grid", "list of values"),
        ({"train.lr": {"choice": [0.1, 0.1]}}, "sweep.space.train.lr.choice", "different"),
        ({"train.lr": {"log": [0, 1]}}, "sweep.space.train.lr.log", "above 0"),
        ({"train.lr": {"uniform": [1, 0.5]}}, "sweep.space.train.lr.uniform", "lower one first"),
        ({"train.lr": {"uniform": [0.1, math.inf]}}, "sweep.space.train.lr.uniform", "[low, high]"),
        ({"train.lr": {"uniform": [0.1, 0.2, 0.3]}}, "sweep.space.train.lr.uniform", "[low, high]"),
        ({"train.epochs": {"int": [1, 2.5]}}, "sweep.space.train.epochs.int", "whole numbers"),
        ({"cluster.pools": {"grid": [1, 2]}}, "sweep.space.cluster.pools", "same for all trials"),
        ({"data.root": {"grid": ["a"]}}, "sweep.space.data.root", "same for all trials"),
        ({"levels.ratios": [0.5, 1.0]}, "sweep.space.levels.ratios", "must say what to try"),
        ({"levels.ratios": [{"log": [0, 1]}, 1.0]}, "sweep.space.levels.ratios[0].log", "above 0"),
        (
            {"time.policy": {"grid": ["wait"]}, "time.policy.factor": {"grid": [1.3]}},
            "sweep.space.time.policy.factor",
            "sweep.space.time.policy too",
        ),
    ],
)
def test_a_mistake_is_one_line(content: dict[str, Any], key: str, right: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(content)
    assert caught.value.key == key
    assert right in str(caught.value)
    assert "\n" not in str(caught.value)
