"""Scores against sums written out by hand, and what makes a chain of prunings one."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cluster_fl.models.layered import Layered
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.extraction import extract, read
from cluster_fl.nesting.importance import chain, numbers, prune, scores
from cluster_fl.nesting.plan import State
from cluster_fl.nesting.submodel import Submodel, full, index_map, prefix
from cluster_fl.nesting.tracing import anatomy

SPEC = ModelSpec("resnet8", (1, 8, 8), 10, seed=3, options={"widths": [4, 8, 16]})


def two_layers() -> tuple[Anatomy, Layered]:
    """Linear 2 -> 3 -> 2 -> 2 without biases: two groups of hidden channels."""

    def unit(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(OrderedDict(linear=nn.Linear(inputs, outputs, bias=False), relu=nn.ReLU()))

    model = Layered(nn.Flatten(), [unit(2, 3), unit(3, 2)], unit(2, 2))
    return anatomy(model, (2, 1, 1)), model


def group(traced: Anatomy, name: str, axis: int) -> int:
    spans = traced.axes[name][axis]
    assert spans is not None
    return spans[0].wire


def test_every_layer_that_writes_to_a_group_counts() -> None:
    model = SPEC.build()
    traced = anatomy(SPEC.skeleton(), SPEC.input_shape)
    weights = read(model)
    found = scores(traced, full(traced), weights)
    for number in range(len(traced.groups)):
        writers = [
            name
            for name, array in weights.items()
            if array.ndim > 1 and name in traced.parameters and traced.axes[name][0] is not None
            if group(traced, name, 0) == number
        ]
        expected = sum(np.abs(weights[name].astype(np.float64)).sum(axis=(1, 2, 3)) for name in writers)
        np.testing.assert_allclose(found[number], expected, rtol=1e-12)
        assert len(writers) >= 1


def test_a_channel_behind_a_flattening_is_worth_its_filter() -> None:
    spec = ModelSpec("fedavg_cnn", (1, 8, 8), 10, seed=0)
    model = spec.build()
    traced = anatomy(spec.skeleton(), spec.input_shape)
    weights = read(model)
    found = scores(traced, full(traced), weights)
    for name in ("units.0.conv.weight", "units.1.conv.weight", "units.2.linear.weight"):
        rows = np.abs(weights[name].astype(np.float64)).reshape(len(weights[name]), -1).sum(1)
        np.testing.assert_allclose(found[group(traced, name, 0)], rows, rtol=1e-12)


def test_only_channels_that_are_there_count_as_inputs() -> None:
    traced, model = two_layers()
    weights = read(model)
    first, second = (group(traced, f"units.{n}.linear.weight", 0) for n in (0, 1))
    channels: list[tuple[int, ...]] = [(0, 1, 2), (0, 1)]
    channels[first], channels[second] = (0, 2), (0, 1)
    submodel = replace(full(traced), channels=tuple(channels))
    part = {name: weights[name][where] for name, where in index_map(traced, submodel).items()}
    expected = np.abs(weights["units.1.linear.weight"][:, [0, 2]]).sum(1)
    np.testing.assert_allclose(scores(traced, submodel, part)[second], expected, rtol=1e-6)


def test_the_first_of_equal_channels_stay() -> None:
    submodel = Submodel((4,), (0,), (1,))
    assert prune(submodel, [np.array([1.0, 2, 2, 2])], [2]).channels == ((1, 2),)
    assert prune(submodel, [np.ones(4)], [3]).channels == (3,)  # a prefix, as a number
    assert prune(Submodel(((1, 2, 5),), (0,), (1,)), [np.array([3.0, 1, 2])], [2]).channels == ((1, 5),)


def crafted(second: np.ndarray) -> tuple[Anatomy, State, list[Submodel], int]:
    """A chain 3, 2 -> 2, 2 -> 2, 1 in which the first step takes the first hidden group's last channel away."""
    traced, model = two_layers()
    weights = read(model)
    weights["units.0.linear.weight"] = np.array([[3, 3], [2, 2], [1, 1]], np.float32)
    weights["units.1.linear.weight"] = second.astype(np.float32)
    shapes = []
    for first, last in ((3, 2), (2, 2), (2, 1)):
        channels = [0, 0]
        channels[group(traced, "units.0.linear.weight", 0)] = first
        channels[group(traced, "units.1.linear.weight", 0)] = last
        shapes.append(replace(full(traced), channels=tuple(channels)))
    return traced, weights, shapes, group(traced, "units.1.linear.weight", 0)


def one_shot(traced: Anatomy, weights: State, shape: Submodel) -> Submodel:
    counts = [len(numbers(own)) for own in shape.channels]
    return prune(
        replace(shape, channels=full(traced).channels), scores(traced, full(traced), weights), counts
    )


def test_a_later_step_judges_what_the_one_before_left() -> None:
    # Row 0 is larger as a whole, but owes it to the channel that goes first.
    traced, weights, shapes, second = crafted(np.array([[1, 1, 9], [2, 2, 0]]))
    assert chain(traced, weights, shapes)[-1].channels[second] == (1,)
    assert one_shot(traced, weights, shapes[-1]).channels[second] == 1  # the first one


def test_a_chain_is_a_ranking_where_inputs_do_not_matter() -> None:
    traced, weights, shapes, _ = crafted(np.array([[1, 1, 1], [2, 2, 2]]))
    assert chain(traced, weights, shapes) == [one_shot(traced, weights, shape) for shape in shapes]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=5))
def test_each_model_lies_within_the_one_before(seed: int, widths: list[float]) -> None:
    traced = anatomy(SPEC.skeleton(), SPEC.input_shape)
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in traced.shapes.items()}
    widths = sorted(widths, reverse=True)
    shapes = [prefix(traced, width, traced.depth, (traced.depth,), "ceil") for width in widths]
    made = chain(traced, weights, shapes)
    assert [submodel.shape for submodel in made] == [shape.shape for shape in shapes]
    outer = full(traced)
    for inner in made:
        for large, small in zip(outer.channels, inner.channels, strict=True):
            assert set(numbers(small)) <= set(numbers(large))
        outer = inner


def test_the_bits_do_not_depend_on_the_layout() -> None:
    traced = anatomy(SPEC.skeleton(), SPEC.input_shape)
    weights = read(SPEC.build())
    turned = {name: np.asfortranarray(array) for name, array in weights.items()}
    for a, b in zip(scores(traced, full(traced), weights), scores(traced, full(traced), turned), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("width", [0.3, 0.6])
def test_a_pruned_model_can_be_extracted(width: float) -> None:
    model = SPEC.build()
    traced = anatomy(SPEC.skeleton(), SPEC.input_shape)
    shape = prefix(traced, width, traced.depth, (traced.depth,), "ceil")
    (made,) = chain(traced, read(model), [shape])
    small = read(extract(model, traced, made))
    assert {n: a.shape for n, a in small.items()} == {
        n: a.shape for n, a in read(extract(model, traced, shape)).items()
    }
