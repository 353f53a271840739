"""Exits and truncation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cluster_fl.errors import UserError
from cluster_fl.models import Layered, build
from cluster_fl.models.exits import attach_exits
from cluster_fl.models.norm import apply_norm_policy

SHAPE = (3, 16, 16)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def with_exits(name: str, positions: tuple[int, ...], kind: str = "conv3") -> Layered:
    model = build(name, SHAPE, 10, generator_seed=0)
    attach_exits(model, positions, kind, SHAPE, 10, seed=0)
    apply_norm_policy(model, "batch")
    return model


def batch() -> Tensor:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet20", "conv3"),
        ("resnet18", "linear"),
        ("preact_2222", "conv3"),
        ("heterofl_cnn", "conv3"),
        ("mlp", "linear"),
    ],
)
def test_truncated_model_answers_as_the_full_ones_first_exits(name: str, kind: str) -> None:
    depth = build(name, SHAPE, 10).depth
    early = tuple(range(1, depth))
    model, x = with_exits(name, early, kind), batch()
    full = model(x)
    assert len(full) == depth
    for last in early:
        small = copy.deepcopy(model)
        small.truncate(range(last), range(1, last + 1))
        logits = small(x)
        assert len(logits) == last
        assert all(torch.equal(a, b) for a, b in zip(logits, full, strict=False))


def test_nothing_is_left_behind_the_last_exit() -> None:
    model = with_exits("resnet20", (3, 6))
    names = dict(model.named_parameters())
    model.truncate(range(9), [6])
    kept = {n for n in names if n.startswith("stem.") or n.startswith("exits.6.")}
    kept |= {n for n in names if n.startswith("units.") and int(n.split(".")[1]) < 6}
    assert set(dict(model.named_parameters())) == kept
    assert set(model.state_dict()) == kept
    assert model.head is None
    assert model.depth == 9


def test_every_parameter_of_a_truncated_model_is_trained() -> None:
    model = with_exits("resnet20", (3, 6))
    model.truncate(range(6), [3, 6])
    torch.stack([logits.square().sum() for logits in model(batch())]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_full_depth_keeps_the_head() -> None:
    model, x = with_exits("resnet20", (3, 6)), batch()
    full = model(x)
    model.truncate(range(9), [6, 9])
    assert all(torch.equal(a, b) for a, b in zip(model(x), full[1:], strict=True))


def test_exit_follows_the_kept_units_before_it() -> None:
    model, x = with_exits("resnet20", (2, 3, 5, 9)), batch()
    small = copy.deepcopy(model)
    small.truncate([0, 3, 6, 7], [2, 3, 5, 9])
    with torch.no_grad():
        early = model.units["0"](model.stem(x))
        middle = model.units["3"](early)
        assert model.head is not None
        expected = [
            model.exits["2"](early),
            model.exits["3"](early),
            model.exits["5"](middle),
            model.head(model.units["7"](model.units["6"](middle))),
        ]
        assert all(torch.equal(a, b) for a, b in zip(small(x), expected, strict=True))


def test_a_skipped_unit_is_a_residual_branch_of_zero() -> None:
    model, x = with_exits("preact_2222", ()), batch()
    small = copy.deepcopy(model)
    small.truncate([0, 2, 3, 4, 6, 7], [8])
    for number in ("1", "5"):
        nn.init.zeros_(model.units[number].conv2.weight)
    assert torch.equal(small(x)[-1], model(x)[-1])


@pytest.mark.parametrize(
    ("units", "exits", "line"),
    [
        ([0, 1, 2, 3], [4], "exits=4: the model answers only after 3, 6, 9 units."),
        ([0], [], "exits=[]: a model needs at least one exit."),
    ],
)
def test_impossible_truncation(units: list[int], exits: list[int], line: str) -> None:
    with pytest.raises(UserError) as caught:
        with_exits("resnet20", (3, 6)).truncate(units, exits)
    assert str(caught.value) == line


def test_units_that_are_gone_stay_gone() -> None:
    model = with_exits("resnet20", (3, 6))
    model.truncate([0, 2], [3])
    with pytest.raises(UserError, match="units=1: the model has only 0, 2"):
        model.truncate([0, 1, 2], [3])
    with pytest.raises(UserError, match="exits=9: the model answers only after 3 units"):
        model.truncate([0, 2], [9])


@pytest.mark.parametrize(
    ("name", "units", "line"),
    [
        ("mlp", [1], "units=0: cannot be left out: it is no residual unit that keeps its input's shape."),
        (
            "preact_1112",
            [0, 1, 3, 4],
            "units=2: cannot be left out: it is no residual unit that keeps its input's shape.",
        ),
    ],
)
def test_units_that_cannot_be_left_out(name: str, units: list[int], line: str) -> None:
    """A plain layer, and a block whose shortcut needs a norm of its branch."""
    model = build(name, SHAPE, 10)
    with pytest.raises(UserError) as caught:
        model.truncate(units, [model.depth])
    assert str(caught.value) == line


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_a_dropped_unit_keeps_its_projection(name: str) -> None:
    model, x = with_exits(name, ()), batch()
    first = next(int(key) for key, unit in model.units.items() if not unit.skippable)
    small, dropped = copy.deepcopy(model), (0, first)
    small.truncate([n for n in range(model.depth) if n not in dropped], [model.depth])
    assert {n for n in small.state_dict() if n.startswith(f"units.{first}.")} == {
        f"units.{first}.shortcut.{leaf}" for leaf in ("conv.weight", "bn.weight", "bn.bias")
    }
    assert not any(n.startswith("units.0.") for n in small.state_dict())
    with torch.no_grad():
        inner = model.stem(x)
        for number, unit in model.units.items():
            if int(number) == first:
                inner = unit.shortcut(inner).relu()
            elif int(number) not in dropped:
                inner = unit(inner)
        assert torch.equal(small(x)[-1], model.head(inner))


def test_a_dropped_projection_is_trained() -> None:
    model = with_exits("resnet20", ())
    model.truncate([0, 1, 4], [9])
    model(batch())[-1].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_was_dropped_stays_dropped() -> None:
    model = with_exits("resnet20", (6,))
    model.truncate([0, 1, 4, 5], [6])
    before, x = model(batch()), batch()
    model.truncate([0, 1, 4, 5], [6])
    assert torch.equal(model(x)[-1], before[-1])
    assert list(model.units) == ["0", "1", "3", "4", "5"]


def test_behind_the_last_exit_no_projection_stays() -> None:
    model = with_exits("resnet20", (3,))
    model.truncate([0, 1, 2], [3])
    assert list(model.units) == ["0", "1", "2"]
