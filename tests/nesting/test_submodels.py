"""A submodel computes what the global model computes with everything outside the index set to zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cluster_fl.models.layered import Layered
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import cost, count
from cluster_fl.nesting.extraction import extract, load, read
from cluster_fl.nesting.submodel import Submodel, full, gather, index_map, lengths, prefix
from cluster_fl.nesting.tracing import anatomy, state_tensors

MODELS = {
    "resnet14": ((3, 16, 16), "conv3", (2, 4)),
    "resnet18": ((3, 32, 32), "conv3", (2, 5)),
    "preact_1112": ((3, 16, 16), "conv3", (1, 3)),
    "heterofl_cnn": ((1, 28, 28), "conv3", (2,)),
    "fedavg_cnn": ((1, 28, 28), "linear", (1,)),
    "mlp": ((1, 8, 8), "linear", (1,)),
}


def made(name: str) -> tuple[ModelSpec, Layered, Anatomy]:
    shape, head, exits = MODELS[name]
    options = {"widths": [8, 12, 16, 20]} if name in ("preact_1112", "heterofl_cnn") else {}
    spec = ModelSpec(name, shape, 10, seed=1, exits=exits, exit_head=head, options=options)
    model = spec.build()
    return spec, model, anatomy(model, shape)


def masked(model: Layered, traced: Anatomy, submodel: Submodel) -> Layered:
    """The global model with zeros wherever the submodel has nothing, at full size."""
    whole = extract(model, traced, full(traced))
    state = read(model)
    zeroed = {name: np.zeros_like(array) for name, array in state.items()}
    for name, where in index_map(traced, submodel).items():
        zeroed[name][where] = state[name][where]
    load(whole, zeroed)
    return whole


@pytest.mark.parametrize(("width", "depth"), [(0.7, 36), (0.7, 42), (0.75, 48)])
def test_resnet110_levels_equal_the_masked_global_model_exactly(width: float, depth: int) -> None:
    spec = ModelSpec("resnet110", (3, 32, 32), 10, seed=0, exits=(36, 42, 48))
    model = spec.build()
    traced = anatomy(model, spec.input_shape)
    exits = [p for p in spec.exits if p <= depth]
    submodel = prefix(traced, width, depth, exits)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # A convolution adds in an order of its own for each number of channels, so float32 sums differ in the
    # last bit. Computed in float64, both are the same float32 numbers.
    small, large = extract(model, traced, submodel).double(), masked(model, traced, submodel).double()
    with torch.no_grad():
        answers = list(zip(small(x), large(x), strict=False))
    assert len(answers) == len(exits)
    for ours, theirs in answers:
        assert (ours.float() - theirs.float()).abs().max().item() == 0.0


def any_submodel(traced: Anatomy, seed: int) -> Submodel:
    """Any channels of every group, not only prefixes, and any exit."""
    rng, answers = np.random.default_rng(seed), (*traced.exits, traced.depth)
    exits = answers[: rng.integers(1, len(answers) + 1)]
    channels: list[int | tuple[int, ...]] = []
    for group in traced.groups:
        keep = int(rng.integers(1, group.size + 1))
        chosen = tuple(sorted(int(c) for c in rng.permutation(group.size)[:keep]))
        channels.append(keep if rng.random() < 0.5 else chosen)
    return Submodel(tuple(channels), tuple(range(exits[-1])), exits)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_index_equals_the_masked_global_model(name: str, seed: int) -> None:
    spec, model, traced = made(name)
    submodel = any_submodel(traced, seed)
    x = torch.randn(3, *spec.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small, large = extract(model, traced, submodel).double(), masked(model, traced, submodel).double()
    with torch.no_grad():
        for ours, theirs in zip(small(x), large(x), strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_extracted_module_is_the_gathered_state_and_costs_what_was_planned(name: str, seed: int) -> None:
    spec, model, traced = made(name)
    submodel = any_submodel(traced, seed)
    small = extract(model, traced, submodel)
    expected = gather(read(model), index_map(traced, submodel))
    found = read(small)
    assert list(found) == list(expected)
    assert all(np.array_equal(found[n], expected[n]) for n in found)
    assert {n: tuple(t.shape) for n, t in state_tensors(small)} == lengths(traced, submodel)
    assert cost(traced, submodel) == count(small, spec.input_shape)


@pytest.mark.parametrize("name", MODELS)
def test_full_submodel_is_the_model(name: str) -> None:
    _, model, traced = made(name)
    whole = extract(model, traced, full(traced))
    assert str(whole) == str(model)
    assert all(np.array_equal(a, read(model)[n]) for n, a in read(whole).items())
    assert whole.stem is not model.stem


def test_prefixes_are_views_and_gathers_are_not() -> None:
    _, model, traced = made("resnet14")
    state = read(model)
    halves = prefix(traced, 0.5, 6, (2, 4, 6))
    assert all(
        np.shares_memory(part, state[n]) for n, part in gather(state, index_map(traced, halves)).items()
    )
    picked = Submodel(tuple((0, g.size - 1) for g in traced.groups), halves.units, halves.exits)
    parts = gather(state, index_map(traced, picked))
    assert not np.shares_memory(parts["units.0.conv1.weight"], state["units.0.conv1.weight"])


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_prefixes_nest(a: float, b: float) -> None:
    _, _, traced = NESTED
    small, large = (prefix(traced, w, 6, (2, 4, 6)) for w in sorted((a, b)))
    assert all(s <= g for s, g in zip(small.channels, large.channels, strict=True))  # type: ignore[operator]


NESTED = made("resnet14")


def test_flattened_features_keep_whole_channels() -> None:
    """A channel of a 7x7 map is 49 neighbouring inputs of the linear layer behind it."""
    _, _, traced = made("fedavg_cnn")
    linear = next(n for n, shape in traced.shapes.items() if shape == (512, 64 * 49))
    axis = traced.axes[linear][1]
    assert axis is not None
    assert [(traced.groups[span.wire].size, span.repeat) for span in axis] == [(64, 49)]


class Unsplittable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.cumsum(self.before(x), dim=1))  # type: ignore[no-any-return]


def test_an_operation_without_a_rule_is_never_cut_and_says_why() -> None:
    traced = anatomy(Unsplittable(), (8,))
    assert traced.groups == ()
    assert "cumsum" in traced.fixed["before.weight:0"]
    assert traced.axes["after.weight"][1] is None


class Branches(nn.Module):
    """Two branches concatenated, then added to a third: spans of the concatenation stay apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.mix, self.last = nn.Conv2d(10, 5, 1), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.mix(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))  # type: ignore[no-any-return]


def test_concatenation_is_sliced_part_by_part() -> None:
    model = Branches()
    traced = anatomy(model, (3, 4, 4))
    assert [group.size for group in traced.groups] == [4, 6, 5]
    index = index_map(traced, Submodel((2, 3, 5), (), (0,)))
    np.testing.assert_array_equal(np.ravel(index["mix.weight"][1]), [0, 1, 4, 5, 6])
    x = torch.randn(2, 3, 4, 4)
    small = extract(model, traced, Submodel((2, 3, 5), (), (0,)))
    with torch.no_grad():
        for conv, kept in ((model.a, 2), (model.b, 3)):
            conv.weight[kept:] = 0
            assert conv.bias is not None
            conv.bias[kept:] = 0
        torch.testing.assert_close(small(x), model(x))
