"""Units left out of the middle: what stays of them, what it costs, and that it computes a step size of zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.errors import UserError
from cluster_fl.models.layered import Layered
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import cost, count
from cluster_fl.nesting.extraction import extract, load, read
from cluster_fl.nesting.submodel import Submodel, full, gather, index_map, lengths, present
from cluster_fl.nesting.tracing import anatomy, state_tensors

SHAPE = (3, 16, 16)
WIDTHS = {"resnet14": [4, 6, 8], "resnet18": [4, 6, 8, 10], "wide_resnet101_2": [2, 4, 4, 6]}


def made(name: str) -> tuple[Layered, Anatomy]:
    spec = ModelSpec(name, SHAPE, 10, seed=1, exits=(3,), steps=True, options={"widths": WIDTHS[name]})
    model = spec.build()
    return model, anatomy(model, SHAPE)


MADE = {name: made(name) for name in WIDTHS}


def any_units(traced: Anatomy, seed: int) -> Submodel:
    """Any units and any share of the channels, with or without the early exit, or ending there."""
    rng = np.random.default_rng(seed)
    exits = [(3, traced.depth), (traced.depth,), (3,)][rng.integers(3)]
    units = tuple(n for n in range(exits[-1]) if rng.random() < 0.6)
    return Submodel(tuple(int(rng.integers(1, g.size + 1)) for g in traced.groups), units, exits)


@pytest.mark.parametrize("name", WIDTHS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_is_what_was_planned(name: str, seed: int) -> None:
    """Names, shapes, values and, to the unit, fvcore's own count of the extracted module."""
    model, traced = MADE[name]
    submodel = any_units(traced, seed)
    small = extract(model, traced, submodel)
    expected = gather(read(model), index_map(traced, submodel))
    assert list(read(small)) == list(expected) == list(present(traced, submodel))
    assert all(np.array_equal(array, expected[n]) for n, array in read(small).items())
    assert {n: tuple(t.shape) for n, t in state_tensors(small)} == lengths(traced, submodel)
    assert cost(traced, submodel) == count(small, SHAPE)


@pytest.mark.parametrize("name", ["resnet14", "resnet18"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_computes_the_global_model_without_what_it_lacks(name: str, seed: int) -> None:
    model, traced = MADE[name]
    submodel = any_units(traced, seed)
    state = read(model)
    zeroed = {name: np.zeros_like(array) for name, array in state.items()}
    for name, where in index_map(traced, submodel).items():
        zeroed[name][where] = state[name][where]
    large = extract(model, traced, full(traced)).double()
    load(large, zeroed)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        answers = dict(zip((*traced.exits, traced.depth), large(x), strict=True))
        for position, ours in zip(submodel.exits, extract(model, traced, submodel).double()(x), strict=True):
            torch.testing.assert_close(ours, answers[position], rtol=1e-9, atol=1e-9)


def test_a_dropped_unit_costs_its_projection() -> None:
    _, traced = MADE["resnet14"]
    whole = full(traced)
    without = Submodel(whole.channels, (0, 1, 3, 4, 5), (6,))
    lost = {name for name in present(traced, whole) if name.startswith("units.2.")}
    kept = lost & set(present(traced, without))
    assert kept == {f"units.2.shortcut.{leaf}" for leaf in ("conv.weight", "bn.weight", "bn.bias")}
    shallow, deep = cost(traced, without), cost(traced, Submodel(whole.channels, tuple(range(6)), (6,)))
    assert deep.params - shallow.params == 4 * 6 * 9 + 6 * 6 * 9 + 4 * 6 + 1
    assert deep.macs - shallow.macs == 8 * 8 * (4 * 6 * 9 + 6 * 6 * 9)


def test_a_unit_that_keeps_its_shape_vanishes() -> None:
    _, traced = MADE["resnet14"]
    names = present(traced, Submodel(full(traced).channels, (0, 2, 3, 4, 5), (6,)))
    assert not any(name.startswith("units.1.") for name in names)


def test_behind_the_last_exit_nothing_stays() -> None:
    """Truncation in depth (ScaleFL) is as it was: no projection of a unit that is not reached."""
    _, traced = MADE["resnet14"]
    names = list(present(traced, Submodel(full(traced).channels, (0, 1, 2), (3,))))
    assert {name.split(".")[1] for name in names if name.startswith("units.")} == {"0", "1", "2"}


def test_a_shortcut_that_reads_its_branch_cannot_stay_alone() -> None:
    spec = ModelSpec("preact_1112", SHAPE, 10, seed=1, options={"widths": [4, 4, 6, 8]})
    model = spec.build()
    traced = anatomy(model, SHAPE)
    channels = full(traced).channels
    assert cost(traced, Submodel(channels, (0, 2, 3, 4), (5,))).params  # as for any user's own unit
    with pytest.raises(UserError, match="units=2: cannot be left out"):
        extract(model, traced, Submodel(channels, (0, 1, 3, 4), (5,)))
